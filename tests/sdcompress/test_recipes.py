"""The recipes load with the published figures, and every command line in them and in docs/ is valid."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from sdcompress_engines.errors import UsageError

from sdcompress.cli import COMMANDS, cli
from sdcompress.cli.recipes import TRAINERS, read_purpose, render_config, resolve_recipe
from sdcompress.prune.presets import make_plan
from sdcompress.train.config import KINDS, DistillConfig
from sdcompress.train.recipes import load_config, read_recipe, recipe_names, recipe_path

DOCS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
WITHOUT_COMMANDS = ("architecture.md",)
SD1 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
}
# steps, whole batch, rate, weights: MODEL_CARD.md of BK-SDM; huggingface.co/blog/sd_distillation, the cards and the
# README of distill-sd
PUBLISHED = {
    "bk-sdm-base": (50_000, 4 * 64, 5e-5, (1, 1, 1)),
    "bk-sdm-small": (50_000, 4 * 64, 5e-5, (1, 1, 1)),
    "bk-sdm-tiny": (50_000, 4 * 64, 5e-5, (1, 1, 1)),
    "segmind-small": (100_000, 32 * 4, 1e-4, (1, 0.5, 0.5)),
    "segmind-tiny": (125_000, 32 * 4, 1e-4, (1, 0.5, 0.5)),
    "segmind-portrait": (131_000, 32 * 4, 1e-4, None),
}


def words_of(line: str) -> list[str]:
    """Returns the words of a shell command line, without comment and redirection."""
    words = shlex.split(line, comments=True)
    return words[: words.index(">")] if ">" in words else words


def complaint(line: str) -> str | None:
    """Returns what is wrong with a `sdcompress ...` command line, or None. Nothing is run.

    Commands that do not exist yet are not checked.
    """
    words = words_of(line)
    words = words[words.index("sdcompress") + 1 :]
    command: click.Command = cli
    context = click.Context(cli, info_name="sdcompress")
    while isinstance(command, click.Group):
        if command is cli and words[0] not in COMMANDS:
            return None
        words = command.with_command(words) if hasattr(command, "with_command") else words  # `bench X` is `bench run X`
        subcommand = command.get_command(context, words[0])
        if subcommand is None:
            return f"no command {words[0]}"
        command, context = subcommand, click.Context(subcommand, info_name=words.pop(0), parent=context)
    try:
        values, rest, _ = command.make_parser(context).parse_args(words)
        for parameter in command.params:
            if parameter.required and values.get(parameter.name or "") in (None, (), click.core.UNSET):
                return f"{parameter.human_readable_name} is missing"
            if isinstance(
                parameter.type, click.Choice | click.types.IntParamType | click.types.FloatParamType
            ) and isinstance(values.get(parameter.name or ""), str):
                parameter.type.convert(values[parameter.name or ""], parameter, context)
    except click.ClickException as error:
        return error.format_message()
    return f"too many arguments: {rest}" if rest else None


def command_lines(text: str) -> list[str]:
    """Returns the `sdcompress` command lines of a page, also under accelerate and torchrun, on one line each."""
    blocks = "\n".join(line.lstrip() if line.startswith("    ") else "" for line in text.splitlines()).replace(
        "\\\n", " "
    )
    return [
        line
        for line in blocks.splitlines()
        if re.match(r"(sdcompress |(accelerate launch|torchrun) .*-m sdcompress )", line)
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_opens_with_its_command_and_its_purpose(name: str) -> None:
    kind, config = resolve_recipe(name)
    heading = recipe_path(name).read_text().splitlines()
    line = heading[0].removeprefix("# ")
    assert f"--recipe {name} " in line
    assert line.startswith(f"sdcompress {TRAINERS[kind].rpartition(' ')[0]} ")
    assert complaint(line) is None
    assert read_purpose("\n".join(heading)) == heading[1].removeprefix("# ")
    assert config.batch_size % (config.gradient_accumulation * 8) == 0 or name.startswith("nano")
    assert kind == "decoder" or config.validation_prompts


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures(name: str) -> None:
    steps, batch, rate, weights = PUBLISHED[name]
    kind, config = resolve_recipe(name)
    assert (config.steps, config.batch_size, config.learning_rate) == (steps, batch, rate)
    assert config.caption_dropout == 0
    assert kind == ("finetune" if weights is None else "distill")
    if isinstance(config, DistillConfig):
        assert (config.task_weight, config.output_kd_weight, config.feature_kd_weight) == weights
        assert config.feature_norm == "none"
        assert config.plan is not None
        assert (
            make_plan(SD1, config.plan).name
            == {"base": "bk-base", "small": "bk-base" if "segmind" in name else "bk-small", "tiny": "bk-tiny"}[
                name.rsplit("-", 1)[1]
            ]
        )
    else:
        assert config.data.size_px == 768
        assert config.precision == "fp16"


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_read_back_is_the_same(name: str, tmp_path: Path) -> None:
    kind, config = resolve_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(f"kind: {kind}\n{render_config(config)}")
    assert resolve_recipe(str(path)) == (kind, config)
    assert set(yaml.safe_load(path.read_text())) == {"kind", *KINDS[kind].model_fields}


@pytest.mark.parametrize("kind", KINDS)
def test_every_knob_has_a_description(kind: str) -> None:
    text = render_config(load_config(KINDS[kind], None, {}))
    lines = text.splitlines()
    for above, line in itertools.pairwise(lines):
        if not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("# ")
            assert above.strip() not in ("#", "# None")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_command_line_in_the_docs_is_valid(page: Path) -> None:
    lines = command_lines(page.read_text(encoding="utf-8"))
    assert lines or page.name in WITHOUT_COMMANDS
    assert {line: fault for line in lines if (fault := complaint(line))} == {}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_recipe_named_in_the_docs_exists(page: Path) -> None:
    for line in command_lines(page.read_text()):
        words = words_of(line)
        named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--recipe"]
        if "recipes" in words and words[words.index("recipes") + 1] != "list":
            named.append(words[words.index("recipes") + 2])
        for name in named:
            assert name in recipe_names() or name == "mine.yaml"


def test_the_docs_name_every_recipe_with_its_kind() -> None:
    rows = dict(
        re.findall(
            r"^\| `([\w-]+)` \| ([\w-]+) \|",
            next(page for page in DOCS if page.name == "recipes.md").read_text(),
            re.MULTILINE,
        )
    )
    assert rows == {name: read_recipe(name).get("kind", "distill") for name in recipe_names()}


def test_settings_named_in_the_docs_are_knobs() -> None:
    for page in DOCS:
        for line in command_lines(page.read_text()):
            words = words_of(line)
            settings = tuple(words[i + 1] for i, word in enumerate(words) if word == "--set")
            kind = next((kind for kind, typed in TRAINERS.items() if typed.split()[0] in words), "distill")
            load_config(KINDS[kind], None, {}, settings)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("sdcompress distill t --data d -o o --recipes nano", "--recipes"),
        ("sdcompress distill t -o o", "data"),
        ("sdcompress recipes shw nano", "shw"),
        ("sdcompress push a b c", "too many"),
        ("accelerate launch --num_processes 8 -m sdcompress distill t --data d -o o --steps many", "many"),
    ],
)
def test_the_check_of_command_lines_finds_faults(line: str, fault: str) -> None:
    assert fault in (complaint(line) or "")


def test_true_is_no_share_of_a_caption() -> None:
    with pytest.raises(UsageError, match="true or false"):
        load_config(DistillConfig, None, {}, ("data.captions={text: true}",))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (("steps=5", "steps=6"), "steps"),
        (("data.flip=true", "data={flip: false}"), "data.flip"),
        (("data=5", "data.flip=true"), "data"),
    ],
)
def test_a_knob_that_is_set_twice_is_refused(settings: tuple[str, ...], name: str) -> None:
    with pytest.raises(UsageError, match=f"--set {re.escape(name)} has two values"):
        load_config(DistillConfig, "nano", {"steps": 4}, settings)


def test_knobs_of_one_section_are_merged() -> None:
    config = load_config(DistillConfig, "bk-sdm-tiny", {"data": {"crop": "random"}}, ("data.views=3", "steps=6"))
    assert (config.data.crop, config.data.views, config.data.flip, config.steps) == ("random", 3, True, 6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("validation_prompts=a cat", "validation_prompts: input should be a list, got 'a cat'"),
        ("data=5", "data: input should be a mapping of names to values, got 5"),
        ("data.where=[aesthetic]", "data.where: --where 'aesthetic'; expected FIELD, one of"),
        ("data.views=4", "views 4 needs crop random"),
        ("data.captions={text: 0}", "captions: every column has the share 0"),
    ],
)
def test_a_wrong_value_is_described_in_the_words_of_a_recipe(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_config(DistillConfig, "nano", {}, (setting,))
