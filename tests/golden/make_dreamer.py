"""Write dreamer/*.npz: what the tests need of arrays that the authors' DreamerV3 has computed.

    python tests/golden/make_dreamer.py FOLDER_OF_THE_FULL_FILES

dreamer/README.md says where the full files come from and what the names mean.
"""

import sys
from pathlib import Path

import numpy as np

WHOLE = (
    "g0_init_stats", "g1_modules", "g2_symlog", "g2_twohot", "g2_kl", "g2_lambda_return",
    "g2_retnorm", "g2_slow_critic", "g2_replay_critic_loss", "g2_optimiser",
    "g2_optimiser_underflow", "g4_replay_driver",
)  # fmt: skip
RESOLUTION = 1e-7  # of stored changes of parameters
# intermediate arrays of an update that tests ask for
SEEN = ("img_return", "deter", "tokens", "post_logits", "img_deter", "img_prior_logits")


def small(name, array):
    """Indices and classes as bytes; everything else as it is."""
    if array.dtype == np.int32 and "class" in name:
        return array.astype(np.uint8)
    return array


def imagination(file):
    """The 255 logits of the first and the last call; all five calls of the rest."""
    wide = ("call1.", "call2.", "call3.")
    return {k: v for k, v in file.items() if not (k.startswith(wide) and v.shape[-1:] == (255,))}


def one_update(file, grads):
    """Without most intermediate arrays; the parameters' changes as signs, which is all there is."""
    out = {}
    for name, array in file.items():
        kind, _, rest = name.partition(".")
        if kind == "grad" and not rest.startswith(grads):
            continue
        if kind == "param_after" and not rest.startswith("slow_critic"):
            move = (array - file[f"param.{rest}"]) / 1e-3
            known = (file[f"grad.{rest}"] == 0) | (np.abs(file[f"grad.{rest}"]) >= 1e-16)
            assert (np.abs(move - np.round(move))[known] < 1e-3).all()
            # 9 where the gradient is too small to compare
            out[f"sign_of_move.{rest}"] = np.where(known, np.round(move), 9).astype(np.int8)
        elif kind != "mid" or rest in SEEN:
            out[name] = array
    return out


def three_updates(file, shared):
    """Without the parameters where they are those of another file."""
    out = {}
    for name, array in file.items():
        kind, _, rest = name.partition(".")
        if kind == "param_after3" and not rest.startswith("slow_critic"):
            skip = file.get(f"skip.{rest}", np.zeros(array.shape, bool))
            change = np.where(skip, 0, array - file[f"param.{rest}"])
            out[f"move.{rest}"] = quantised(change)
        elif kind == "param" and np.array_equal(array, shared[name]):
            continue
        else:
            out[name] = array
    return out


def quantised(change):
    steps = np.round(change / RESOLUTION)
    assert np.abs(steps).max() < 2**15
    return steps.astype(np.int16)


def main(source):
    target = Path(__file__).parent / "dreamer"
    files = {path.stem: dict(np.load(path)) for path in source.glob("*.npz")}
    made = {name: files[name] for name in WHOLE}
    for kind in ("disc", "cont"):
        made[f"g2_imag_loss_{kind}"] = imagination(files[f"g2_imag_loss_{kind}"])
    made["g3a_vector_discrete"] = one_update(files["g3a_vector_discrete"], "")
    # of the continuous one those gradients that another kind of action changes
    made["g3b_vector_continuous"] = one_update(files["g3b_vector_continuous"], ("actor", "core"))
    made["g3a_three_updates"] = three_updates(
        files["g3a_three_updates"], made["g3a_vector_discrete"]
    )
    for name, arrays in made.items():
        np.savez_compressed(target / name, **{k: small(k, v) for k, v in arrays.items()})


main(Path(sys.argv[1]))
