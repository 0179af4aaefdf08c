"""What people do on Windows, run here in processes that lack what Windows lacks: see `like_windows/sitecustomize.py`, a
stand-in.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
LIKE_WINDOWS = Path(__file__).parent / "like_windows"
CLI = ("-m", "sdcompress")
TRAINING = ("--steps", "2", "--batch-size", "2", "--precision", "fp32", "--checkpoint-every", "1")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in takes away what Linux has")


def environment(cache: Path) -> dict[str, str]:
    """Of a process without what Windows lacks."""
    path = os.pathsep.join(filter(None, [str(LIKE_WINDOWS), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {
        "PYTHONPATH": path,
        "SDCOMPRESS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }


def run(*arguments: object, cache: Path, cwd: Path | None = None) -> str:
    """Run Python with the arguments; returns its stdout."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, env=environment(cache), cwd=cwd or cache, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout.decode("utf-8")


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    """A folder with what SD-WebUI is recognized by."""
    root = tmp_path / "stable-diffusion-webui"
    for name in ("webui.py", "modules/sd_unet.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    "code",
    [
        "import fcntl",
        "import resource",
        "from pwd import getpwuid",
        "import importlib; importlib.import_module('termios')",
        "import os; os.fork",
        "from os import setsid",
        "import os; os.killpg",
        "import os; os.sched_getaffinity",
        "import os; os.getloadavg",
        "import os; os.sysconf",
        "import signal; signal.SIGKILL",
        "import signal; signal.SIGHUP",
        "import multiprocessing; multiprocessing.get_context('forkserver')",
        "open('/proc/meminfo')",
        "from pathlib import Path; Path('/proc/self/status').read_text()",
        "import os; os.listdir('/sys')",
        "import os; os.open('/proc/stat', 0)",
        "open('file', 'w').write('→')",
        "open('a:b', 'w')",
        "import os; os.mkdir('NUL')",
        "import os; os.symlink('file', 'link')",
        "file = open('file', 'w')\nimport os; os.unlink('file')",
        "file = open('file', 'w')\nimport os; os.mkdir('x'); os.replace('file', 'x/file')",
        "import os, shutil; os.mkdir('x')\nfile = open('x/file', 'w')\nshutil.rmtree('x')",
        "import os; os.mkdir('x'); os.mkdir('y'); os.replace('x', 'y')",
    ],
)
def test_the_stand_in_refuses_to_our_modules_what_windows_lacks(code: str, tmp_path: Path) -> None:
    module = f"""
import sys
path = {str(ROOT / "sdcompress" / "pretended.py")!r}
try:
    exec(compile({code!r}, path, "exec"), {{"__file__": path, "__name__": "pretended"}})
except (ImportError, AttributeError, OSError, ValueError) as error:
    sys.exit(f"refused: {{error}}")
"""
    command = [sys.executable, "-c", module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path, check=False)
    assert "refused" in done.stderr


def test_the_stand_in_leaves_other_modules_what_linux_has(tmp_path: Path) -> None:
    code = "import fcntl, os, signal; print(os.getloadavg() and signal.SIGKILL and open('/proc/meminfo').readline())"
    assert "MemTotal" in run("-c", code, cache=tmp_path)


def test_every_module_and_program_imports(tmp_path: Path) -> None:
    found = json.loads(run(LIKE_WINDOWS / "cases.py", "imports", cache=tmp_path).splitlines()[-1])
    assert found["imported"] > 150
    assert found["needs a host"] <= 8


@pytest.mark.slow
def test_a_plan_is_written_and_read_again(tmp_path: Path) -> None:
    run(*CLI, "plan", "nano", "--preset", "bk-tiny", "-o", "plan.json", cache=tmp_path)
    assert "bk-tiny for nano" in run(*CLI, "plan", "nano", "--preset", "plan.json", cache=tmp_path)


def test_the_store_lists_what_it_holds(tmp_path: Path) -> None:
    assert "no engines in" in run(*CLI, "engines", "list", cache=tmp_path)


@pytest.mark.slow
def test_a_picture_is_generated_in_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    run(*CLI, "generate", "nano", "a flat icon of a cat", "--steps", "2", "-o", "cat.png", cache=tmp_path)
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (128, 128)


def test_a_plugin_is_installed_beside_a_running_host_and_taken_away(webui: Path, tmp_path: Path) -> None:
    (webui / "launch.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "launch.py"], cwd=webui, stdout=subprocess.PIPE) as host:
        try:
            assert host.stdout is not None
            host.stdout.readline()
            said = run(*CLI, "install", "webui", webui, cache=tmp_path)
        finally:
            host.kill()
    assert f"SD-WebUI is running (process {host.pid})" in said
    assert "is running" not in run(*CLI, "install", "webui", webui, cache=tmp_path)
    record = json.loads((webui / "extensions/sd-webui-sdcompress/installed.json").read_text())
    assert not [name for name in record["files"] if "\\" in name or ":" in name or not (webui / name).is_file()]
    run(*CLI, "uninstall", "webui", webui, cache=tmp_path)
    assert not (webui / "extensions").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distilled student in `run` and its pictures, whose captions are beyond cp1252, in `pictures`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (128, 128), (60 * number, 10, 200)).save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text(f"\ufeffa café sign → 猫 {number}\n", encoding="utf-8")
    run(*CLI, "distill", "nano", "--data", "pictures", *TRAINING, "-o", "run", cache=folder)
    return folder


def test_a_student_is_distilled(trained: Path) -> None:
    assert (trained / "run/pipeline/sdcompress.json").is_file()
    metrics = [json.loads(line) for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2


def test_force_empties_the_training_folder_while_its_lock_is_held(trained: Path) -> None:
    (trained / "run/left").mkdir(exist_ok=True)
    run(
        *CLI,
        "distill",
        "nano",
        "--data",
        "pictures",
        "--cache",
        "run-cache",
        *TRAINING,
        "-o",
        "run",
        "--force",
        cache=trained,
    )
    assert not (trained / "run/left").exists()
    assert (trained / "run/pipeline/sdcompress.json").is_file()


@pytest.mark.slow
def test_a_card_beyond_the_code_page_is_written_and_printed(trained: Path) -> None:
    words = "resnet–attention pairs"
    assert words in run(*CLI, "push", "run", "you/name", "--dry-run", cache=trained)
    run(*CLI, "push", "run", "you/name", "--dry-run", "-o", "card", cache=trained)
    assert words in (trained / "card/README.md").read_text(encoding="utf-8")


def test_a_spawned_case_answers_or_ends_with_all_it_started(tmp_path: Path) -> None:
    answer, crashed, late, started = json.loads(
        run(LIKE_WINDOWS / "cases.py", "isolated", tmp_path, cache=tmp_path).splitlines()[-1]
    )
    assert answer == {"twice": 8}
    assert crashed == {"failed": "its process ended with status 3: boom"}
    assert late == {"failed": "took over 8 s"}
    deadline = time.monotonic() + 5
    while (left := [pid for pid in started if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def text_without_encoding(path: Path) -> list[int]:
    """Lines that read or write text in the system's code page."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("read_text", "write_text"):
            found.append(node.lineno)
        mode = (
            node.args[1:2]
            if isinstance(function, ast.Name) and function.id == "open"
            else node.args[:1]
            if isinstance(function, ast.Attribute) and function.attr == "open"
            else []
        )
        if (
            mode
            and isinstance(mode[0], ast.Constant)
            and isinstance(mode[0].value, str)
            and set(mode[0].value) <= set("rwax+t")
        ):
            found.append(node.lineno)
    return found


def test_text_names_its_encoding() -> None:
    folders = [ROOT / name for name in ("sdcompress", "engines", "bench", "plugins", "tools")]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert len(files) > 100
    assert not {path.relative_to(ROOT).as_posix(): lines for path in files if (lines := text_without_encoding(path))}
