"""A module compiled ahead of time runs as the module does, and a package that does not belong here says so before its
code is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineError, EngineMismatch, NotTrusted, UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.runners import AotInductorRunner, TensorSpec, compile_package, open_runner
from sdcompress_engines.runners.aot_package import AxisRange, Facts, check_fits, read_facts
from sdcompress_engines.trust import allow

DTYPE = torch.bfloat16


class Block(torch.nn.Module):
    """A convolution and an attention over pixels and a context, as a UNet has them, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = (
            torch.nn.Conv2d(4, 32, 3, padding=1),
            torch.nn.GroupNorm(8, 32),
            torch.nn.Conv2d(32, 4, 3, padding=1),
        )
        self.query, self.keys = torch.nn.Linear(32, 32), torch.nn.Linear(16, 64)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = (
            torch.nn.functional.silu(self.norm(self.into(sample)))
            + timestep.to(sample.dtype)[:, None, None, None] / 1000
        )
        keys, values = self.keys(context).chunk(2, dim=-1)
        attended = torch.nn.functional.scaled_dot_product_attention(
            self.query(hidden.flatten(2).transpose(1, 2))[:, None], keys[:, None], values[:, None]
        )[:, 0]
        hidden = hidden + attended.transpose(1, 2).reshape(hidden.shape)
        return self.out(hidden), hidden.mean((2, 3))


INPUTS = (
    TensorSpec("sample", ("batch", 4, "height", "width"), DTYPE),
    TensorSpec("timestep", ("batch",), torch.float32),
    TensorSpec("context", ("batch", "tokens", 16), DTYPE),
)
OUTPUTS = (TensorSpec("out_sample", ("batch", 4, "height", "width"), DTYPE), TensorSpec("mean", ("batch", 32), DTYPE))


def feeds(batch: int = 2, height: int = 16, width: int = 16, tokens: int = 77) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(batch, 4, height, width).to(DTYPE),
        "timestep": torch.full((batch,), 500.0),
        "context": torch.randn(batch, tokens, 16).to(DTYPE),
    }


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval().to(DTYPE)


@pytest.fixture(scope="module")
def package(block: Block, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once: some 30 s."""
    batch = torch.export.Dim("batch", min=1, max=8)
    side = {axis: 8 * torch.export.Dim(f"{name}_8", min=1, max=4) for axis, name in ((2, "height"), (3, "width"))}
    tokens = 77 * torch.export.Dim("tokens_77", min=1, max=3)
    shapes = ({0: batch, **side}, {0: batch}, {0: batch, 1: tokens})
    folder = tmp_path_factory.mktemp("package")
    path = compile_package(block, tuple(feeds(2, 16, 16, 154).values()), shapes, folder / "unet.pt2", INPUTS, OUTPUTS)
    assert [p.name for p in folder.iterdir()] == ["unet.pt2"]
    return path


@pytest.mark.slow
def test_a_package_computes_what_the_module_does_at_every_shape_it_was_made_for(block: Block, package: Path) -> None:
    with open_runner(package) as runner, torch.no_grad():
        assert (runner.inputs, runner.outputs, runner.device, runner.backend) == (
            INPUTS,
            OUTPUTS,
            torch.device("cpu"),
            "aot-inductor",
        )
        for batch, height, width, tokens in ((1, 8, 8, 77), (2, 16, 24, 77), (3, 32, 8, 231), (8, 16, 16, 154)):
            given = feeds(batch, height, width, tokens)
            truth = block(*given.values())
            found = runner.infer(given)
            for spec, want in zip(OUTPUTS, truth, strict=True):
                assert found[spec.name].dtype == DTYPE
                assert relative_l2(found[spec.name], want) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"batch": 9}, r"batch 9 is outside.*batch 1 to 8"),
        ({"height": 12}, r"height 12 is outside.*height 8 to 32 in steps of 8"),
        ({"width": 40}, r"width 40 is outside.*width 8 to 32"),
        ({"tokens": 78}, r"tokens 78 is outside.*tokens 77 to 231 in steps of 77"),
    ],
)
def test_shapes_it_was_not_compiled_for_are_refused(package: Path, shape: dict[str, int], said: str) -> None:
    with open_runner(package) as runner, pytest.raises(EngineMismatch, match=said):
        runner.infer(feeds(**shape))


@pytest.mark.slow
def test_fixed_sizes_are_refused_by_the_code_that_would_not_notice(package: Path) -> None:
    with open_runner(package) as runner, pytest.raises(EngineMismatch, match=r"sample has shape \(2, 5, 16, 16\)"):
        runner.infer({**feeds(), "sample": torch.zeros(2, 5, 16, 16, dtype=DTYPE)})


@pytest.mark.slow
def test_outputs_belong_to_the_caller_and_a_closed_runner_opens_again(package: Path) -> None:
    runner = open_runner(package)
    given = feeds()
    first = runner.infer(given)["out_sample"]
    copy = first.clone()
    runner.infer(feeds())
    assert torch.equal(first, copy)
    runner.close()
    with pytest.raises(EngineError, match="not open"):
        runner.infer(given)
    with runner:
        assert torch.equal(runner.infer(given)["out_sample"], copy)


@pytest.mark.slow
def test_a_package_says_what_it_is_without_being_loaded(package: Path) -> None:
    facts = read_facts(package)
    assert (facts.torch, facts.device, facts.inputs) == (torch.__version__, "cpu", INPUTS)
    assert facts.axes == {
        "batch": AxisRange(1, 8),
        "height": AxisRange(8, 32, 8),
        "width": AxisRange(8, 32, 8),
        "tokens": AxisRange(77, 231, 77),
    }
    assert facts.isa


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "noise", "foreign"])
def test_a_damaged_package_is_an_engine_error(package: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "unet.pt2"
    content = bytearray(package.read_bytes())
    if damage == "flipped":
        with zipfile.ZipFile(package) as archive:
            code = next(entry for entry in archive.infolist() if entry.filename.endswith(".so"))
        content[code.header_offset + code.file_size // 2] ^= 1
    if damage == "foreign":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data/model_metadata.json", json.dumps({"AOTI_DEVICE_KEY": "cpu"}))
    else:
        path.write_bytes(
            {"cut": content[: len(content) // 2], "flipped": content, "empty": b"", "noise": bytes(range(256)) * 20}[
                damage
            ]
        )
    with pytest.raises(NotTrusted, match="was built elsewhere"):  # not this machine's file any more
        open_runner(path)
    allow(path)
    with pytest.raises(EngineError, match=r"unet\.pt2.*export it again") as caught:
        open_runner(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_package_that_is_not_the_one_of_its_manifest_is_not_loaded(package: Path, tmp_path: Path) -> None:
    (tmp_path / "unet.pt2").write_bytes(b"something else")
    write_manifest(tmp_path, "package")
    (tmp_path / "unet.pt2").write_bytes(package.read_bytes())
    with pytest.raises(ArtifactError, match="not the one of its manifest"):
        open_runner(tmp_path / "unet.pt2")
    write_manifest(tmp_path, "package")
    open_runner(tmp_path / "unet.pt2").close()


def facts_here() -> Facts:
    from sdcompress_engines.flavour import platform_name

    return Facts(torch.__version__, platform_name(), "cpu", (), (), INPUTS, OUTPUTS, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.6.0"}, r"compiled for torch 2\.6\.0, and this is"),
        ({"platform": "windows-amd64"}, "platform windows-amd64"),
        ({"device": "cuda"}, "device cuda, and this is cpu"),
    ],
)
def test_a_package_made_elsewhere_says_what_differs(change: dict[str, Any], said: str) -> None:
    check_fits(facts_here(), torch.device("cpu"), "unet.pt2")
    with pytest.raises(EngineMismatch, match=said) as caught:
        check_fits(replace(facts_here(), **change), torch.device("cpu"), "unet.pt2")
    assert "export it again" in str(caught.value)


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell what the processor has"
)
def test_code_for_instructions_that_this_processor_lacks_is_refused() -> None:
    lacking = [name for name, there in torch.cpu.get_capabilities().items() if there is False]
    if not lacking:
        pytest.skip("this processor has them all")
    with pytest.raises(EngineMismatch, match=f"a processor with {lacking[0].upper()}, which this one does not have"):
        check_fits(replace(facts_here(), isa=(lacking[0].upper(),)), torch.device("cpu"), "unet.pt2")


def test_another_suffix_is_refused(block: Block, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.pt2"):
        compile_package(block, tuple(feeds().values()), None, tmp_path / "unet.so", INPUTS, OUTPUTS)
    with pytest.raises(UsageError, match="no such file"):
        AotInductorRunner(tmp_path / "unet.pt2").open()


def test_without_a_compiler_the_message_names_what_to_install_and_nothing_is_left(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom sdcompress_engines.errors import BackendMissing\nfrom sdcompress_engines.runners"
        " import TensorSpec, TorchRunner, compile_package\nmodule, given = torch.nn.Sequential(torch.nn.Linear(4, 4),"
        " torch.nn.SiLU()), torch.ones(2, 4)\nspecs = [TensorSpec('x', (2, 4), torch.float32)], [TensorSpec('y', (2,"
        " 4), torch.float32)]\nfor attempt in (lambda: compile_package(module, [given], None, sys.argv[1], *specs),"
        " lambda: TorchRunner(module, *specs, mode='compile').open().infer({'x': given})):\n    try: attempt()\n   "
        " except BackendMissing as error: print(error)\n"
    )
    engines = Path(sys.modules["sdcompress_engines.runners"].__file__ or "").parents[2]
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(engines),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out" / "x.pt2")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("C++ compiler" in line and "g++" in line for line in lines)
    assert list((tmp_path / "out").iterdir()) == []
