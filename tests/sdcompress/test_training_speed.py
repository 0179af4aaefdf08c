"""What makes a training step fast does not change its result: the teacher's precision, compiled blocks, rare checks."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import attention_pairs, build_student
from sdcompress.train.batches import NoisyBatch
from sdcompress.train.kernels import compile_blocks
from sdcompress.train.objectives.block_distillation import BlockDistillation
from sdcompress.train.precision import copy_frozen, resolve_precision
from sdcompress.train.stopping import any_process_stops

WEIGHTS = {"task_loss": 1.0, "output_kd_loss": 1.0, "feature_kd_loss": 1.0}


def make_batch() -> NoisyBatch:
    generator = torch.Generator().manual_seed(3)
    sample, target = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    return NoisyBatch(
        sample, torch.tensor([10, 900]), torch.randn(2, 77, 96, generator=generator), target, torch.ones(2)
    )


def make_pair(pipeline: Any, precision: str, attention: bool = False) -> tuple[Any, BlockDistillation]:
    """A bk-tiny student of a pipeline's UNet, and the objective that holds the teacher."""
    plan = make_plan(pipeline.unet.config, "bk-tiny")
    torch.manual_seed(0)
    student = build_student(pipeline.unet, plan).float().train()
    weights = WEIGHTS | ({"attention_kd_loss": 1.0} if attention else {})
    pairs = attention_pairs(student, plan)
    return student, BlockDistillation(
        copy_frozen(pipeline.unet, precision), plan.feature_pairs(), weights, "none", pairs
    )


def test_the_teacher_computes_in_its_own_precision_inside_the_students_autocast(random_pipeline: Any) -> None:
    student, objective = make_pair(random_pipeline, "bf16")
    assert objective.teacher is not None
    seen: dict[str, tuple[torch.dtype, bool]] = {}

    def look(name: str, inputs: Any) -> None:
        seen[name] = inputs[0].dtype, torch.is_autocast_enabled("cpu")

    for name, network in (("teacher", objective.teacher), ("student", student)):
        network.conv_in.register_forward_pre_hook(lambda module, inputs, name=name: look(name, inputs))
    with objective.attach_hooks(student), torch.autocast("cpu", torch.bfloat16):
        losses = objective.compute_losses(student, make_batch())
    assert seen == {"teacher": (torch.bfloat16, False), "student": (torch.float32, True)}
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


def test_losses_in_bf16_stay_near_those_in_fp32(random_pipeline: Any) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        student, objective = make_pair(random_pipeline, precision)
        with objective.attach_hooks(student), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses[precision] = {
                name: value.item() for name, value in objective.compute_losses(student, make_batch()).items()
            }
    for name, value in losses["fp32"].items():
        assert losses["bf16"][name] == pytest.approx(value, rel=0.02), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch._dynamo
@pytest.mark.parametrize("attention", [False, True])
def test_compiled_blocks_give_the_losses_and_gradients_of_the_network(random_pipeline: Any, attention: bool) -> None:
    results = []
    for compiled in (False, True):
        student, objective = make_pair(random_pipeline, "fp32", attention)
        torch._dynamo.reset()
        with ExitStack() as stack:
            stack.enter_context(objective.attach_hooks(student))
            if compiled:
                counters = [CompileCounter() for _ in range(2)]
                for network, hooked, counter in zip(
                    (student, objective.teacher), objective.hooked_modules, counters, strict=True
                ):
                    assert stack.enter_context(compile_blocks(network, hooked, backend=counter)) > 8
                stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
            for _ in range(2):  # the second pass uses the compiled code
                losses = objective.compute_losses(student, make_batch())
            losses["loss"].backward()
            if compiled:
                assert min(counter.frame_count for counter in counters) > 4
        results.append(({name: value.item() for name, value in losses.items()}, student.conv_in.weight.grad.clone()))
        assert "forward" not in vars(student.down_blocks[0].resnets[0])
    (plain, plain_gradient), (again, gradient) = results
    assert len(plain) == 4 + attention
    assert again == pytest.approx(plain, rel=1e-5)
    assert torch.allclose(gradient, plain_gradient, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(("card", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_bf16_is_chosen_only_where_the_card_computes_it(
    card: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # its answer on every card
    assert resolve_precision("auto", "cuda") == precision


def test_processes_exchange_stop_signals_every_tenth_step_and_a_single_process_never() -> None:
    asked: list[float] = []

    def reduce(value: torch.Tensor, _kind: str) -> torch.Tensor:
        asked.append(value.item())
        return value

    def accelerator(processes: int) -> Any:
        return SimpleNamespace(num_processes=processes, device="cpu", reduce=reduce)

    assert [any_process_stops(accelerator(1), True, step) for step in (1, 2)] == [True, True]
    assert asked == []
    answers = [any_process_stops(accelerator(2), True, step) for step in range(1, 31)]
    assert [step for step, answer in enumerate(answers, 1) if answer] == [10, 20, 30]
    assert len(asked) == 3
