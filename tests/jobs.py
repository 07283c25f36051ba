"""Jobs of the accelerator's queue for its tests: scripts that end well, fail or hang."""

import json
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"backend": "gpu", "device": "1 x a GPU", "versions": {"jax": "0"}, "cpus": 2}


def make_job(accelerator, tmp_path, name, body, minutes=1.0, **fields):
    """A job whose script has `out`, the folder of its record, and `write(rows)`."""
    script = tmp_path / f"{name}.py"
    script.write_text(
        "import json, os, signal, subprocess, sys, time\n"
        "out = sys.argv[sys.argv.index('--out') + 1]\n"
        "def write(rows):\n"
        "    path = os.path.join(out, 'record.json')\n"
        "    open(path + '.partial', 'w').write(json.dumps({'rows': rows}))\n"
        "    os.replace(path + '.partial', path)\n" + body
    )
    code = fields.pop("code", ("mbrl_jax/prng.py",))
    return accelerator.Job(name, "a test", str(script), "", "", minutes, code, **fields)


GOOD = "write([1, 2])\n"
FAILS = "write([1])\nraise ValueError('no such thing')\n"
HANGS = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "write([1, 2, 3])\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    "open({pid!r}, 'w').write(str(child.pid))\n"
    "time.sleep(300)\n"
)


def alive(pid):
    """Whether the process runs; one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def dies(pid):
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def read(path):
    return json.loads(path.read_text())
