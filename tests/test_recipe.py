"""Recipes: what is accepted, what is refused and in which words."""

import os
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from opfa.compression.grains import Block, Heads
from opfa.compression.schedules import Gradual
from opfa.downstream.recipe import FinetuneRecipe
from opfa.errors import RecipeError
from opfa.training.zero import DeepSpeedFile
from opfa.upstream.recipe import PretrainRecipe

LAUNCH = Path(__file__).parents[1] / "launch"
PRETRAIN = """
name = "tiny"
[corpus]
documents = ["a.txt", "b.txt"]
train_tokenizer = { vocabulary = 200 }
[model.config]
model_type = "bert"
[training]
steps = 20
batch = 4
learning_rate = 1e-3
"""
PRUNING = """
[pruning.schedule]
start = 2
end = 10
target = 0.9
"""
FINETUNE = """
name = "tiny"
[model]
init = "student/model"
[task]
train = "a.jsonl"
[training]
learning_rate = 1e-4
"""
ANSWERS = (
    'task.kind="question-answering"',
    "task.text_pair=context",
    'task.metrics=["squad_f1"]',
    "task.sequence_tokens=384",
)


def pretrain(tmp_path: Path, *overrides: str, text: str = PRETRAIN) -> PretrainRecipe:
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    return PretrainRecipe.read(tmp_path / "x.toml", overrides)


def finetune(tmp_path: Path, *overrides: str) -> FinetuneRecipe:
    (tmp_path / "x.toml").write_text(FINETUNE)
    return FinetuneRecipe.read(tmp_path / "x.toml", overrides)


# reading


def test_an_unknown_key_is_named_with_its_file_and_a_near_match(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"x\.toml with training\.stpes=3:\n  training\.stpes: unknown key; did you mean 'ste",
    ):
        pretrain(tmp_path, "training.stpes=3")


def test_an_unknown_section_in_capitals_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Training: unknown key; did you mean 'training'"):
        pretrain(tmp_path, "Training.steps=3")


def test_an_unknown_key_without_a_near_match_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="masking.qqq: unknown key; known keys: probability, who"):
        pretrain(tmp_path, "masking.qqq=3")


def test_a_near_match_is_looked_for_in_a_section_within_a_section(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pruning\.schedule\.evry: .* did you mean 'every'\?"):
        pretrain(tmp_path, "pruning.schedule.evry=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=ten", r"training.steps: .* valid integer \(got 'ten'\)"),
        ("training.steps=10.0", r"training.steps: .* valid integer \(got 10.0\)"),
        ("training.steps=true", r"training.steps: .* valid integer \(got True\)"),
        ("name=3", r"name: .* valid string \(got 3\)"),
        ("training.rewind_learning_rate=1", r"valid boolean \(got 1\)"),
        ("training.learning_rate=inf", r"training.learning_rate: .* finite number \(got inf\)"),
        ("training.learning_rate=nan", r"training.learning_rate: .* finite number \(got nan\)"),
        ("training.precision=half", r"Input should be 'bf16', 'fp16' or 'fp32' \(got 'half'\)"),
        ("training=3", r"training: Input should be an object \(got 3\)"),
        ("corpus.documents=a.txt", r"corpus.documents: must be a list, such as .* \(got 'a.txt'\)"),
    ],
)
def test_a_wrong_type_is_refused_with_its_value(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pretrain(tmp_path, override)


def test_a_wrong_free_value_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        pretrain(tmp_path, "model.config.hidden_size=[1]")
    problem = "model.config.hidden_size: must be a string, a number or a boolean (got [1])"
    where = f"{tmp_path}/x.toml with model.config.hidden_size=[1]"
    assert str(caught.value) == f"{where}:\n  {problem}"


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        pretrain(tmp_path, "seed=-1", "corpus.sequnce_tokens=8", "training.batch=0", "data=1")
    text = str(caught.value)
    assert len(text.splitlines()) == 1 + 4
    assert all(key in text for key in ("seed", "sequnce_tokens", "training.batch", "data"))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match=r"training\.learning_rate: missing"):
        PretrainRecipe.check({**tomllib.loads(PRETRAIN), "training": {"steps": 1, "batch": 1}})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: can't read this recipe: no such file"):
        PretrainRecipe.read(tmp_path / "none.toml")


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"x\.toml: not valid TOML: .*line 2"):
        pretrain(tmp_path, text='name = "a"\nseed =\n')


# bounds: whatever is too large, too deep or no plain file is one short message, and soon


def refused(path: Path, *overrides: str) -> str:
    """What is said of a recipe that must be refused at once."""
    began = time.process_time()  # another process may be busy
    with pytest.raises(RecipeError) as caught:
        FinetuneRecipe.read(path, overrides)
    assert time.process_time() - began < 3
    assert len(str(caught.value)) < 4_000
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("seed = " + "9" * 5_000, "an integer has too many digits"),
        ("seed = 18446744073709551616", "seed: must be an integer of at most 64 bits"),
        ("seed = 0x" + "f" * 5_000, "seed: must be an integer of at most 64 bits"),
        ("seed = 9223372036854775807", "seed: Input should be less than 4611686018427387904"),
        ("x = " + "[" * 900 + "]" * 900, "more than 16 sections or lists within"),
        ("x = " + "{a=" * 900 + "1" + "}" * 900, "more than 16 sections or lists within"),
        ("x = " + "[" * 30 + "]" * 30, "more than 16 sections or lists within each other"),
        (".".join("a" * 10_000) + " = 1", "a key has more than 100 parts"),
        ("x = {" + ".".join(["'a'"] * 10_000) + " = 1}", "a key has more than 100 parts"),
        (".".join("a" * 50) + " = 1", "more than 16 sections or lists within each other"),
        (f"{'k' * 5_000} = 1", "kkk...: unknown key; known keys: name, seed"),
        ("data = 2020-01-01", "data: a date has no place in a recipe; write a text"),
        ("x = 1e400", "x: unknown key"),
        ("seed = [" + "1," * 150_000 + "]", "seed: 150,000 values, at most 100,000 are accepted"),
        ("\0", "not valid TOML"),
        ("# \udce9", "'utf-8' codec can't decode byte 0xe9"),
        ("# " + "." * (1 << 20), "more than 1,048,576 bytes"),
        ("".join(f"k{i}=1\n" for i in range(90_000)), "90,004 values, at most 1,000"),
    ],
    ids=range(18),
)
def test_what_no_recipe_holds_is_refused_in_seconds(
    tmp_path: Path, more: str, message: str
) -> None:
    (tmp_path / "x.toml").write_text(f"{more}\n{FINETUNE}", errors="surrogateescape")
    assert message in refused(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=" + "n" * 5_000, "name: 5,000 characters, at most 4,096 are accepted"),
        ("name=" + "n" * 300, "name: String should have at most 200 characters"),
        ("model.init=" + "n" * 5_000, "model.init: 5,000 characters, at most 4,096 are accepted"),
        ("model.init=a\0b", "model.init: must be a text in UTF-8 without zero bytes"),
        ("name=\udcff", "name: must be a text in UTF-8"),
        ("n\udcff=1", "its keys must be texts in UTF-8"),
        ("n" * 5_000 + "=1", "unknown key"),
        (".".join("a" * 10_000) + "=1", "its key has more than 16 parts"),
        ("a.b.c.d=1", "a: unknown key"),
        ("x=" + "[" * 5_000, "more than 16 sections or lists within"),
        ("seed=" + "9" * 5_000, "an integer has too many digits"),
        ("training.learning_rate=1e300", "must be within fp32"),
        ("training.learning_rate=1e400", r"Input should be a finite number (got inf)"),
        ("training.batch=1000000000000", "less than or equal to 1048576"),
        ("training.epochs=1e30", "less than or equal to 1000000"),
        ("training.epochs=3\nbatch=7", "more than one value"),
        ("name=07:32:00", "name: a time has no place in a recipe"),
        ("tr\u0430ining.epochs=1", "unknown key ('tr\\u0430ining'); did you mean 'training'?"),
        ("pruning.pattern.include=['" + "(a+)+" * 200 + "']", "1,000 characters, at most 500"),
        ("pruning.pattern.include=['a{99999999999}']", "not a regular expression"),
    ],
    ids=range(20),
)
def test_an_override_is_bounded_as_the_file_is(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(FINETUNE)
    assert message in refused(tmp_path / "x.toml", override)


def test_steps_and_machine_matters_of_an_upstream_recipe_are_bounded(tmp_path: Path) -> None:
    wrong = ("training.steps=1000000000000000000", "launch.timeout_seconds=1e30")
    with pytest.raises(RecipeError) as caught:
        pretrain(tmp_path, *wrong, "launch.workers=100000", "corpus.sequence_tokens=10000000000")
    assert str(caught.value).count("less than or equal to") == 4


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "large", "missing", "long name"])
def test_what_is_no_small_plain_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * (5_000 if kind == "long name" else 1))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(500 << 20)
    said = refused(path)
    assert "can't read this recipe" in said
    with pytest.raises(RecipeError, match=r"launch\.deepspeed = .*can't read this file"):
        DeepSpeedFile.load(str(path))


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(FINETUNE, encoding="utf-8-sig")
    assert FinetuneRecipe.read(tmp_path / "x.toml").name == "tiny"


def test_of_many_problems_the_first_are_told_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        pretrain(tmp_path, f"corpus.documents={[1] * 1000}", "seed=-1", "seed=2020-01-01")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[1] == "  seed: a date has no place in a recipe; write a text (got 2020-01-01)"
    assert lines[-1] == "  and 981 more"


VALUES = some.recursive(
    some.one_of(
        some.integers(),
        some.floats(),
        some.text(max_size=9),
        some.booleans(),
        some.dates(),
        some.sampled_from(["a" * 5_000, 10**4_000, 1e300, 1 << 63, [], {}]),
    ),
    lambda inner: (
        some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [f"{section}.{key}" for section in ("task", "training", "model") for key in ("a", "init")]
KEYS += ["name", "seed", "task.train", "task.choices", "training.epochs", "pruning", "logging"]
BITS = some.sampled_from(
    ["[", "]", "{", "}", "=", ".", ",", "\n", '"', "'", '"""', "a", "seed", "[[x]]", "1e9", "0x"]
    + ["99999999999999999999", "1979-05-27", "#", "\0", "\ufeff", "inf", " ", "\\u0000", "\udcff"]
)


@settings(max_examples=150, deadline=None)
@given(some.dictionaries(some.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_is_taken_and_written_or_refused_in_few_words(edits: dict[str, Any]) -> None:
    values = tomllib.loads(FINETUNE)
    for key, value in edits.items():
        section, _, last = key.rpartition(".")
        (values[section] if section else values)[last] = value
    try:
        recipe = FinetuneRecipe.check(values)
    except RecipeError as error:
        assert len(str(error)) < 4_000
    else:
        assert FinetuneRecipe.check(tomllib.loads(recipe.to_toml())) == recipe


@settings(max_examples=150, deadline=None)
@given(some.lists(BITS, max_size=30).map("".join), some.lists(BITS, max_size=9).map("".join))
def test_any_text_and_override_is_refused_in_few_words(text: str, override: str) -> None:
    with tempfile.NamedTemporaryFile("w", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        with pytest.raises(RecipeError) as caught:
            PretrainRecipe.read(file.name, [override])
    assert len(str(caught.value)) < 4_000


# overrides


def test_overrides_replace_single_keys(tmp_path: Path) -> None:
    recipe = pretrain(tmp_path, "training.steps=7", 'corpus.documents=["c"]', "data=/some/dir")
    assert (recipe.training.steps, recipe.training.batch) == (7, 4)
    assert (recipe.corpus.documents, recipe.data) == (("c",), "/some/dir")


def test_an_override_makes_a_section_that_was_not_there(tmp_path: Path) -> None:
    recipe = pretrain(tmp_path, "pruning.schedule.end=4", "pruning.schedule.target=0.5")
    assert recipe.pruning is not None
    assert (recipe.pruning.schedule.end, recipe.pruning.schedule.target) == (4, 0.5)


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", ".steps=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"an override reads section\.key=value"):
        pretrain(tmp_path, override)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'name' is a value, not a section"):
        pretrain(tmp_path, "name.first=3")


PARTS = """
[[pruning.parts]]
include = ["a"]
[[pruning.parts]]
grain = "32x32"
"""


def test_an_override_names_a_section_of_a_list_by_its_number(tmp_path: Path) -> None:
    text = PRETRAIN + PRUNING + PARTS
    changes = ("pruning.parts.1.target=0.5", "pruning.parts.0.grain.kind=heads")
    recipe = pretrain(tmp_path, *changes, text=text)
    assert recipe.pruning is not None
    found = [(part.target, part.grain) for part in recipe.pruning.parts]
    assert found == [(None, Heads()), (0.5, Block(rows=32, columns=32))]
    for key, said in [
        ("2.target=0.5", "'2' is none of 2 sections, from 0"),
        ("x.target=0.5", "'x' is none of 2 sections"),
        ("1=0.5", "'parts' is a value, not a section"),
        ("1.grain.rows=0", r"parts.1.grain.kind: missing"),
        ("0.target=1", r"pruning.parts.0.target: .* less than 1 \(got 1\)"),
        ("0.grian=heads", r"pruning.parts.0.grian: unknown key; did you mean 'grain'"),
    ]:
        given = text.replace('grain = "32x32"', "") if "rows" in key else text
        with pytest.raises(RecipeError, match=said):
            pretrain(tmp_path, f"pruning.parts.{key}", text=given)


# writing


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ('name="a \\"quoted\\" \\\\ name\\n\\u007f, 日本, 😀"',),
        ("training.learning_rate=1e-30", "training.epsilon=1e30"),
        ('model.config={model_type="bert", "é ü"=1, "a.b"=true, "c"=0.5}',),
        ("pruning.schedule.end=10", "pruning.schedule.target=0.9", "pruning.pattern.exclude=['a']"),
        (
            "pruning.schedule={end=10, target=0.9}",
            "pruning.parts=[{grain='8x4', include=['a', 'b']}, {grain='heads', target=0.5}, {}]",
        ),
    ],
)
def test_a_written_recipe_is_read_back_equal(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = pretrain(tmp_path, *overrides)
    assert PretrainRecipe.check(tomllib.loads(recipe.to_toml())) == recipe


def test_the_digest_does_not_depend_on_how_the_file_is_written(tmp_path: Path) -> None:
    lines = PRETRAIN.replace("1e-3", "0.001").replace("[model", "# a comment\n[model")
    with_default = lines + "[masking]\nprobability = 0.15\n"
    assert pretrain(tmp_path, text=with_default).sha256() == pretrain(tmp_path).sha256()


def test_the_digest_changes_with_any_value(tmp_path: Path) -> None:
    assert pretrain(tmp_path, "seed=43").sha256() != pretrain(tmp_path).sha256()


def test_a_recipe_can_not_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(pretrain(tmp_path).training, "steps", 3)  # noqa: B010 - pyright knows it's frozen


# what an upstream recipe may not say


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("end=1",), r"pruning.schedule: end = 1: the ramp must not end before start = 2"),
        (("hold_until=9",), r"hold_until = 9: the last mask update .* before the end .*end = 10"),
        (("target=1.0",), r"pruning.schedule.target: Input should be less than 1 \(got 1.0\)"),
        (("target=-0.1",), r"schedule.target: .* greater than or equal to 0 \(got -0.1\)"),
        (("initial=0.95",), r"target = 0.9: must not be below initial = 0.95"),
        (("every=0",), r"pruning.schedule.every: .* greater than or equal to 1"),
        (("end=21",), r"the last mask update, 21, must not come after training.steps = 20"),
        (("hold_until=21",), r"last mask update, 21, must not come after training.steps = 20"),
    ],
)
def test_an_impossible_pruning_schedule_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pretrain(tmp_path, *(f"pruning.schedule.{o}" for o in overrides), text=PRETRAIN + PRUNING)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("pruning.schedule={end=1,target=0.5}", "pruning.parts=[{}]", "pruning.pattern={}"),
            "pruning: pattern, parts: give one of the two",
        ),
        (
            ("pruning.schedule={end=1,initial=0.4,target=0.5}", "pruning.parts=[{target=0.3}]"),
            "parts.0.target = 0.3: must not be below pruning.schedule.initial = 0.4",
        ),
        (("training.warmup_steps=20",), "training.warmup_steps = 20: must be below steps = 20"),
        (("training.rewind_learning_rate=true",), r"rewind_learning_rate: needs \[pruning\]"),
        (("training.cyclic_learning_rate=true",), r"cyclic_learning_rate: needs \[pruning\]"),
        (
            ("training.cyclic_learning_rate=true", "training.rewind_learning_rate=true"),
            "training.rewind_learning_rate, cyclic_learning_rate: give one of the two",
        ),
        (
            ("training.learning_rate=1e-4", "training.lowest_learning_rate=1e-4"),
            "lowest_learning_rate = 0.0001: must be below training.learning_rate = 0.0001",
        ),
        (("training.lowest_learning_rate=0.0",), "lowest_learning_rate: .* greater than 0"),
        (("corpus.hub=a/b",), "corpus: documents, hub: give exactly one of the two"),
        (("corpus.documents=[]",), "corpus: documents, hub: give exactly one of the two"),
        (("corpus.tokenizer=a",), "tokenizer, train_tokenizer: give exactly one of the two"),
        (("model.init=a",), "model: init, config: give exactly one of the two"),
        (("model.config={}",), "config: needs model_type"),
        (("pruning.schedule={end=1,target=0.5}", "pruning.pattern.include=['(']"), "not a regular"),
    ],
)
def test_a_contradiction_in_an_upstream_recipe_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pretrain(tmp_path, *overrides)


def test_stage_0_is_allowed_in_fp32_only(tmp_path: Path) -> None:
    recipe = pretrain(tmp_path, f"launch.deepspeed={LAUNCH}/zero0.json")
    with pytest.raises(RecipeError, match=r"zero0\.json': stage 0 not with bf16"):
        recipe.deepspeed_file(1)
    recipe = pretrain(tmp_path, f"launch.deepspeed={LAUNCH}/zero0.json", "training.precision=fp32")
    assert recipe.deepspeed_file(1).stage == 0


def test_stage_3_can_not_be_compiled(tmp_path: Path) -> None:
    recipe = pretrain(tmp_path, f"launch.deepspeed={LAUNCH}/zero3.json", "launch.compile=true")
    with pytest.raises(RecipeError, match="launch.compile = true: not with stage 3"):
        recipe.deepspeed_file(1)


def test_a_recipe_is_checked_without_opening_other_files(tmp_path: Path) -> None:
    assert pretrain(tmp_path, "launch.deepspeed=nowhere.json").launch.deepspeed == "nowhere.json"


def test_the_learning_rate_rewinds_only_when_the_recipe_says_so(tmp_path: Path) -> None:
    text = PRETRAIN + PRUNING
    rewinding = pretrain(tmp_path, "training.rewind_learning_rate=true", text=text)
    assert pretrain(tmp_path, text=text).learning_rate().rewind_at is None
    assert rewinding.ramp() is not None
    assert rewinding.learning_rate().rewind_at == rewinding.ramp()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_rate_may_go_down_in_cycles_to_a_lowest_one(tmp_path: Path, command: str) -> None:
    given = ("training.cyclic_learning_rate=true", "training.lowest_learning_rate=1e-5")
    ramp = {"start": 2, "end": 10, "every": 4, "target": 0.5}
    if command == "pretrain":
        schedule = ("pruning.schedule.every=4", "pruning.schedule.target=0.5")
        found = pretrain(tmp_path, *given, *schedule, text=PRETRAIN + PRUNING)
        plain = pretrain(tmp_path, *schedule, text=PRETRAIN + PRUNING)
        rates, peak = found.learning_rate(), found.training.learning_rate
    else:
        schedule = "pruning.schedule={start=2, end=10, every=4, target=0.5}"
        found = finetune(tmp_path, *given, schedule, "model.zeros=free", "training.warmup=0.0")
        plain = finetune(tmp_path, schedule, "model.zeros=free", "training.warmup=0.0")
        rates, peak = found.learning_rate(20), found.training.learning_rate
    wanted = Gradual(**ramp)
    assert (rates.lowest, rates.is_cyclic, rates.peak) == (1e-5, True, peak)
    assert rates.rewind_at is not None and rates.rewind_at.end == wanted.end
    assert [rates.at(step) for step in (5, 9, 19)] == pytest.approx([1e-5] * 3)  # before updates
    assert [rates.at(step) for step in (6, 10)] == [peak] * 2
    again = type(found).check(tomllib.loads(found.to_toml()))
    assert again == found and found.sha256() != plain.sha256()
    assert "cyclic" not in plain.to_toml() and "lowest" not in plain.to_toml()  # as before the keys


# shares of a run


def test_a_share_becomes_the_steps_that_it_was_chosen_for(tmp_path: Path) -> None:
    shares = ("end=0.5", "start=0.1", "hold_until=0.8", "every=0.1")
    schedule = tuple(f"pruning.schedule.{share}" for share in shares)
    rest = ("training.warmup_steps=0.25", "training.rewind_learning_rate=true")
    steps = ("pruning.schedule={start=2, end=10, hold_until=16, every=2, target=0.9}",)
    given = pretrain(tmp_path, *schedule, *rest, text=PRETRAIN + PRUNING)
    wanted = pretrain(tmp_path, *steps, "training.warmup_steps=5", rest[1], text=PRETRAIN + PRUNING)
    assert given.ramp() == wanted.ramp()
    assert given.learning_rate() == wanted.learning_rate()
    longer = pretrain(tmp_path, *schedule, *rest, "training.steps=200", text=PRETRAIN + PRUNING)
    assert longer.ramp() == Gradual(start=20, end=100, hold_until=160, every=20, target=0.9)
    assert longer.learning_rate().warmup_steps == 50


def test_1_is_the_first_step_and_1_with_a_point_the_whole_run(tmp_path: Path) -> None:
    text = PRETRAIN + PRUNING.replace("start = 2", "start = 0")
    one = pretrain(tmp_path, "pruning.schedule.end=1", text=text).ramp()
    whole = pretrain(tmp_path, "pruning.schedule.end=1.0", text=text).ramp()
    assert one is not None and whole is not None
    assert (one.end, whole.end) == (1, 20)


def test_a_share_is_written_as_it_was_given(tmp_path: Path) -> None:
    recipe = pretrain(tmp_path, "pruning.schedule.end=1.0", text=PRETRAIN + PRUNING)
    assert "end = 1.0" in recipe.to_toml()
    assert PretrainRecipe.check(tomllib.loads(recipe.to_toml())) == recipe


def test_steps_and_the_share_that_they_are_have_other_digests(tmp_path: Path) -> None:
    def digest(end: str) -> str:
        return pretrain(tmp_path, f"pruning.schedule.end={end}", text=PRETRAIN + PRUNING).sha256()

    assert digest("10") != digest("0.5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("end=0.05",), r"end = 1: the ramp must not end before start = 2, of 20 steps \(start ="),
        (("end=0.2", "start=0.4"), "end = 0.2: the ramp must not end before start = 0.4"),
        (("hold_until=0.4",), "hold_until = 8: .* of 20 steps .*hold_until = 0.4"),
        (("end=1.5",), r"pruning.schedule.end: must be steps, .* from 0.0 up to 1.0 \(got 1.5\)"),
        (("start=-0.1",), r"pruning.schedule.start: must be steps, .* \(got -0.1\)"),
        (("every=0.0",), r"schedule.every: must be steps, .* above 0.0 up to 1.0 \(got 0.0\)"),
        (("every=true",), r"pruning.schedule.every: must be steps, .* \(got True\)"),
        (('end="half"',), r"pruning.schedule.end: must be steps, .* \(got 'half'\)"),
        (("end=nan",), r"pruning.schedule.end: must be steps, .* \(got nan\)"),
    ],
)
def test_an_impossible_share_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pretrain(tmp_path, *(f"pruning.schedule.{o}" for o in overrides), text=PRETRAIN + PRUNING)


def test_a_warm_up_of_the_whole_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training.warmup_steps = 1.0: must be below steps = 20"):
        pretrain(tmp_path, "training.warmup_steps=1.0")


# a recipe's kind, and what follows from its model


def test_a_recipe_of_the_other_command_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(PRETRAIN)
    with pytest.raises(RecipeError, match=r"has \[corpus\], so it is for opfa pretrain$"):
        FinetuneRecipe.read(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text(FINETUNE)
    with pytest.raises(RecipeError, match=r"has \[task\], so it is for opfa finetune$"):
        PretrainRecipe.read(tmp_path / "x.toml")


def test_the_tokenizer_is_the_models_unless_the_recipe_says(tmp_path: Path) -> None:
    given = ("corpus.train_tokenizer=", "model={init='encoder'}")
    assert pretrain(tmp_path, *given).corpus.tokenizer == "encoder"
    assert pretrain(tmp_path, *given, "corpus.tokenizer=other").corpus.tokenizer == "other"
    assert pretrain(tmp_path, given[1]).corpus.tokenizer is None
    with pytest.raises(RecipeError, match="tokenizer, train_tokenizer: give exactly one"):
        pretrain(tmp_path, given[0])


@pytest.mark.parametrize("value", ["0.0", "1.0", "1", "true", "[]"])
def test_validation_is_a_name_or_a_share(tmp_path: Path, value: str) -> None:
    assert finetune(tmp_path, "task.validation=0.1").task.validation == 0.1
    with pytest.raises(RecipeError, match=r"task.validation: must be a file, a split, or a share"):
        finetune(tmp_path, f"task.validation={value}")


# what a downstream recipe may not say


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pruning.schedule={end=1,target=0.5}",), "pruning: needs model.zeros = 'free'"),
        (('task.metrics=["squad_f1"]',), r"metrics = \['squad_f1'\]: for classification these are"),
        (("task.metrics=[]",), r"metrics = \[\]: for classification .*: accuracy, f1, matthews"),
        (('task.metrics=["bleu"]',), r"metrics = \['bleu'\]: for classification these are"),
        (('task.choices=["a"]',), r"choices = \['a'\]: multiple-choice needs its columns"),
        (("task.kind=multiple-choice",), r"choices = \[\]: multiple-choice needs its columns"),
        (
            ("task.kind=token-classification", "task.text_pair=x", 'task.metrics=["entity_f1"]'),
            "text_pair = 'x': tagged words have no pair",
        ),
        (
            ("task.kind=question-answering", "task.text_pair=c", 'task.metrics=["best_squad_f1"]'),
            r"metrics = \['best_squad_f1'\]: for question-answering .*: exact_match, squad_f1$",
        ),
        (("selection.holdout=1.0",), "selection.holdout: Input should be less than 1"),
        (
            ("quantization.bits=8", "training.precision=bf16"),
            "training.precision = 'bf16': 8 bits are trained in fp32",
        ),
        (
            ("distillation.teacher=x", "distillation.soft_weight=0.0"),
            "soft_weight and hidden_weight are both 0",
        ),
        (("selection.patience=0",), "selection.patience: Input should be greater than or equal"),
        (("distillation.hidden_weight=-1.0",), "distillation.hidden_weight: Input should be"),
        (("training.batch=32", "training.micro_batch=5"), "micro_batch = 5: must divide batch"),
        (("quantization.bits=4",), "quantization.bits: Input should be 8"),
        (("quantization.weights=row",), "weights: Input should be 'channel' or 'tensor'"),
        (("quantization.ranges=all",), "ranges: Input should be 'moving-average' or 'percentile'"),
        (("quantization.ranges=percentile",), "percentile = None: .* needs one, such as 99.99"),
        (("quantization.percentile=99.9",), r"percentile = 99.9: .* \(ranges = 'moving-average'\)"),
        (("quantization.percentile=100.0",), "quantization.percentile: Input should be less than"),
        (("quantization.percentile=50.0",), "quantization.percentile: Input should be greater"),
        (("quantization.embeddings=1",), "quantization.embeddings: Input should be a valid bool"),
        (("quantization.freeze=0.0",), "quantization.freeze: Input should be greater than 0"),
        (
            ("quantization.start=0.5", "quantization.freeze=0.4"),
            "freeze = 0.4: must not be less than start = 0.5",
        ),
        (("training.warmup=1.0",), "training.warmup: Input should be less than 1"),
        (("training.cyclic_learning_rate=true",), r"cyclic_learning_rate: needs \[pruning\]"),
        (
            ("training.lowest_learning_rate=1e-5", "sweep.learning_rate=[1e-4, 1e-5]"),
            "lowest_learning_rate = 1e-05: must be below each of sweep.learning_rate, such as",
        ),
        ((ANSWERS[0], ANSWERS[2]), "text_pair: question answering needs the column"),
        ((*ANSWERS, "task.stride_tokens=384"), "stride_tokens = 384: windows of sequence_tokens"),
        (ANSWERS[:3], "stride_tokens = 128: windows of sequence_tokens = 128 can't overlap"),
        (ANSWERS[:2], r"metrics = \['accuracy'\]: for question-answering these are known: exact_m"),
    ],
)
def test_a_contradiction_in_a_downstream_recipe_is_refused(
    tmp_path: Path, overrides: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        finetune(tmp_path, *overrides)


def test_question_answering_takes_windows_that_overlap_by_less_than_their_length(
    tmp_path: Path,
) -> None:
    task = finetune(tmp_path, *ANSWERS).task
    assert (task.sequence_tokens, task.stride_tokens, task.metrics) == (384, 128, ("squad_f1",))


def test_the_stride_does_not_matter_without_windows(tmp_path: Path) -> None:
    assert finetune(tmp_path, "task.sequence_tokens=64").task.stride_tokens == 128


def test_pruning_while_fine_tuning_is_for_free_zeros(tmp_path: Path) -> None:
    schedule = "pruning.schedule={start=5, end=5, target=0.5}"
    assert finetune(tmp_path, schedule, "model.zeros=free").pruning is not None


def test_an_override_without_a_value_takes_a_key_or_a_section_out(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'name = "a"\nseed = 3\n[model]\ninit = "m"\n[task]\n[training]\nlearning_rate = 1e-3\n'
        '[distillation]\nteacher = "t"\n'
    )
    recipe = FinetuneRecipe.read(path, ["distillation=", "seed="])
    assert recipe.distillation is None
    assert recipe.seed == 42
