"""The shipped recipes: they load, have the paper's numbers of BERT-base, and are described."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from opfa.compression.grains import Block, Neurons
from opfa.compression.measured import Curvature, Fisher
from opfa.compression.movement import Movement, SoftMovement
from opfa.compression.scores import Magnitude
from opfa.downstream.recipe import FinetuneRecipe
from opfa.search.recipe import SearchRecipe
from opfa.storage.shipped import find_recipe
from opfa.upstream.recipe import PretrainRecipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
README = RECIPES / "README.md"
ALL = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml"))
FAMILIES = ("bert-base", "bert-large", "distilbert")
STUDENTS = [(family, percent) for family in FAMILIES for percent in (85, 90)]
TASKS = ("sst2", "mnli", "qqp", "qnli", "rte", "mrpc", "cola", "stsb", "wnli", "squad", "squad-v2")
# Columns, classes and metrics as GLUE defines them; the order of classes is that of its labels.
GLUE = {
    "sst2": (("sentence", None), ("negative", "positive"), ("accuracy",)),
    "mnli": (
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
    ),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "cola": (("sentence", None), ("unacceptable", "acceptable"), ("matthews",)),
    "stsb": (("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}


def kind_of(recipe: str) -> type[PretrainRecipe] | type[FinetuneRecipe]:
    """The class that must load a recipe, by its folder and name."""
    folder, name = recipe.split("/")
    if name.endswith("-search.toml"):
        return SearchRecipe
    is_finetuning = folder == "downstream" or name.startswith("finetune")
    if folder == "own":
        is_finetuning = name != "my-encoder.toml"
    if folder == "minilm":
        is_finetuning = name.removeprefix("minilm-").removesuffix(".toml") in (*TASKS, "embed")
    return FinetuneRecipe if is_finetuning else PretrainRecipe


def upstream(name: str) -> PretrainRecipe:
    return PretrainRecipe.read(RECIPES / "upstream" / f"{name}.toml")


def downstream(name: str) -> FinetuneRecipe:
    return FinetuneRecipe.read(RECIPES / "downstream" / f"{name}.toml")


def commands(text: str) -> list[list[str]]:
    """The `opfa` commands that a page or a recipe's first comment shows, as words."""
    lines = text.replace("\\\n#", " ").replace("\\\n", " ").splitlines()
    stripped = [line.removeprefix("#").strip() for line in lines]
    shown = [line for line in stripped if re.match(r"opfa (prepare|pretrain|finetune) ", line)]
    return [shlex.split(line) for line in shown]


def test_every_recipe_that_was_promised_is_there() -> None:
    promised = [f"upstream/{f}-{k}.toml" for f in FAMILIES for k in ("teacher", "85", "90")]
    promised += [f"downstream/{task}{suffix}.toml" for task in TASKS for suffix in ("", "-qat")]
    promised += ["downstream/conll2003.toml", "downstream/swag.toml"]
    promised += [f"quickstart/{name}.toml" for name in ("teacher", "student", "finetune")]
    assert set(promised) <= set(ALL)


@pytest.mark.parametrize("recipe", ALL)
def test_recipe_loads_and_is_named_after_its_file(recipe: str) -> None:
    loaded = kind_of(recipe).read(RECIPES / recipe)
    if not recipe.startswith("quickstart/"):
        assert loaded.name == Path(recipe).stem


@pytest.mark.parametrize("recipe", ALL)
def test_recipe_has_no_absolute_path_and_nothing_to_fill_in(recipe: str) -> None:
    text = (RECIPES / recipe).read_text()
    assert not re.search(r"""["'](/|~|[A-Za-z]:\\)""", text)
    assert "CHANGE_ME" not in text


@pytest.mark.parametrize("recipe", ALL)
def test_recipe_is_listed_in_the_readme(recipe: str) -> None:
    assert f"| `{recipe}` |" in README.read_text()


@pytest.mark.parametrize("recipe", [r for r in ALL if r.startswith("minilm/")])
def test_recipe_of_the_experiment_says_what_runs_it(recipe: str) -> None:
    head = (RECIPES / recipe).read_text().partition("name = ")[0]
    assert "bash launch/reproduce.sh" in head


@pytest.mark.parametrize("recipe", [r for r in ALL if r.startswith(("upstream/", "downstream/"))])
def test_recipe_begins_with_commands_that_use_it(recipe: str) -> None:
    shown = commands((RECIPES / recipe).read_text())
    assert f"recipes/{recipe}" in [words[2] for words in shown]
    assert all((ROOT / words[2]).is_file() for words in shown)


@pytest.mark.parametrize("recipe", [r for r in ALL if r.startswith("own/")])
def test_a_recipe_of_ones_own_is_short_and_shows_commands_by_its_name(recipe: str) -> None:
    text, name = (RECIPES / recipe).read_text(), Path(recipe).stem
    assert len(text.splitlines()) <= 45
    assert name in [words[2] for words in commands(text)]
    known = {model["name"] for model in json.loads((ROOT / "model_cards/index.json").read_text())}
    loaded = kind_of(recipe).read(RECIPES / recipe)
    dense = "sentence-transformers/all-MiniLM-L6-v2"
    assert loaded.model.init in (known if isinstance(loaded, FinetuneRecipe) else {dense})


def test_commands_of_the_readme_are_accepted() -> None:
    text = README.read_text()
    made = re.findall(r"opfa new \S+ (\S+)", text)
    shown = [words for words in commands(text) if words[2] not in made]
    assert len(shown) >= 10
    for _, verb, recipe, *rest in shown:
        path = find_recipe(ROOT / recipe if recipe.endswith(".toml") else recipe)
        kind = kind_of(path.relative_to(RECIPES).as_posix())
        assert (verb == "finetune") == (kind is FinetuneRecipe)
        assert rest[0] == "--output"
        kind.read(path, overrides=rest[2:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["teacher", "85", "90"])
def test_training_has_the_papers_numbers_of_bert_base(family: str, kind: str) -> None:
    recipe = upstream(f"{family}-{kind}")
    training = recipe.training
    assert training.steps == 100_000
    assert training.batch == 256
    assert training.warmup_steps == 1_000  # 1 %
    assert training.weight_decay == 0.01
    assert training.learning_rate == 5e-5
    assert training.precision == "bf16"
    assert recipe.corpus.sequence_tokens == 512
    assert recipe.corpus.validation == 0.05
    assert recipe.corpus.hub == "wikimedia/wikipedia"
    assert recipe.corpus.objective == ("mlm" if family == "distilbert" else "mlm+nsp")


@pytest.mark.parametrize("recipe", [r for r in ALL if r.startswith("upstream/")])
def test_a_recipe_says_whose_numbers_it_has(recipe: str) -> None:
    text = " ".join((RECIPES / recipe).read_text().replace("\n#", "").split())
    is_published = recipe.startswith("upstream/bert-base") and "curvature" not in recipe
    assert ("they are ours." in text) == (not is_published)


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_is_dense_and_trained_alone(family: str) -> None:
    recipe = upstream(f"{family}-teacher")
    assert recipe.pruning is None
    assert recipe.distillation is None
    assert not recipe.training.rewind_learning_rate


@pytest.mark.parametrize(("family", "percent"), STUDENTS)
def test_pruning_has_the_papers_numbers_of_bert_base(family: str, percent: int) -> None:
    recipe = upstream(f"{family}-{percent}")
    assert recipe.pruning is not None
    schedule = recipe.pruning.schedule
    assert (schedule.start, schedule.end, schedule.hold_until) == (0, 50_000, 80_000)
    assert schedule.every == 1_000
    assert schedule.initial == 0.0
    assert schedule.target == percent / 100
    assert recipe.pruning.pattern.scope == "layer"
    assert recipe.training.rewind_learning_rate


@pytest.mark.parametrize(("family", "percent"), STUDENTS)
def test_distillation_has_the_papers_numbers_of_bert_base(family: str, percent: int) -> None:
    distillation = upstream(f"{family}-{percent}").distillation
    assert distillation is not None
    assert (distillation.hard_weight, distillation.soft_weight) == (0.5, 0.5)
    assert distillation.temperature == 2.0
    assert distillation.hidden_weight == 0.0


@pytest.mark.parametrize(("family", "percent"), STUDENTS)
def test_student_repeats_the_training_of_its_teacher_from_its_teacher(
    family: str, percent: int
) -> None:
    student, teacher = upstream(f"{family}-{percent}"), upstream(f"{family}-teacher")
    assert student.model.init == f"runs/{family}-teacher/model"
    assert student.distillation is not None
    assert student.distillation.teacher == student.model.init
    assert (student.data, student.corpus) == (teacher.data, teacher.corpus)
    rewound = teacher.training.model_copy(update={"rewind_learning_rate": True})
    assert student.training == rewound


# the paper's, oBERT's and ours, in the lines that differ

THREE = {  # the paper's or its like, then oBERT's, then ours
    "BERT-base": (
        "upstream/bert-base-90",
        "upstream/bert-base-obert",
        "upstream/bert-base-curvature",
    ),
    "MiniLM": ("minilm/minilm-sparse-90", "minilm/minilm-obert", "minilm/minilm-curvature"),
}


def lines_of(section: BaseModel, name: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a recipe with their values, defaults too; a score with its kind and numbers."""
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from lines_of(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


def differences(*names: str) -> str:
    """What several recipes don't say alike, as a table."""
    recipes = [PretrainRecipe.read(RECIPES / f"{name}.toml") for name in names]
    found = [dict(lines_of(recipe)) for recipe in recipes]
    keys = [key for each in found for key in each if key != "name"]
    heads = [f"`{Path(name).stem}`" for name in names]
    rows = [("key", *heads), ("---", *["---"] * len(names))]
    for key in sorted(set(keys), key=keys.index):
        values = [json.dumps(each[key]) if key in each else "" for each in found]
        if len(set(values)) > 1:
            rows.append((f"`{key}`", *("" if value == "null" else value for value in values)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.mark.parametrize("model", THREE)
def test_the_readme_shows_the_lines_in_which_the_papers_oberts_and_ours_differ(model: str) -> None:
    """OPFA_REWRITE=1 writes them."""
    path = RECIPES / "upstream/README.md"
    text, begin, end = path.read_text(), f"<!-- differences {model} -->\n", "<!-- /differences -->"
    before, _, rest = text.partition(begin)
    shown, _, after = rest.partition(end)
    if os.environ.get("OPFA_REWRITE"):
        path.write_text(f"{before}{begin}{differences(*THREE[model])}\n{end}{after}")
        return
    assert shown == f"{differences(*THREE[model])}\n"


@pytest.mark.parametrize("model", THREE)
def test_the_three_are_of_one_corpus_one_teacher_and_as_many_steps(model: str) -> None:
    papers, *others = (PretrainRecipe.read(RECIPES / f"{name}.toml") for name in THREE[model])
    assert papers.distillation is not None
    for recipe in others:
        assert (recipe.data, recipe.corpus, recipe.model) == (
            papers.data,
            papers.corpus,
            papers.model,
        )
        assert recipe.distillation is not None and recipe.pruning is not None
        assert recipe.distillation.teacher == papers.distillation.teacher
        assert recipe.training.steps == papers.training.steps
        assert recipe.training.batch == papers.training.batch


@pytest.mark.parametrize("name", ["upstream/bert-base-curvature", "minilm/minilm-curvature"])
def test_ours_differs_from_the_papers_in_the_score_alone(name: str) -> None:
    ours = PretrainRecipe.read(RECIPES / f"{name}.toml")
    before = THREE["MiniLM" if "minilm" in name else "BERT-base"][0]
    papers = PretrainRecipe.read(RECIPES / f"{before}.toml")
    assert ours.pruning is not None and papers.pruning is not None
    assert (ours.pruning.pattern.score, papers.pruning.pattern.score) == (Curvature(), Magnitude())
    pattern = ours.pruning.pattern.model_copy(update={"score": Magnitude()})
    pruning = ours.pruning.model_copy(update={"pattern": pattern})
    assert ours.model_copy(update={"name": papers.name, "pruning": pruning}) == papers


@pytest.mark.parametrize("name", ["upstream/bert-base-obert", "minilm/minilm-obert"])
def test_obert_prunes_twelve_times_in_cycles_of_one_length(name: str) -> None:
    recipe = PretrainRecipe.read(RECIPES / f"{name}.toml")
    ramp, rates = recipe.ramp(), recipe.learning_rate()
    assert ramp is not None and recipe.pruning is not None and recipe.distillation is not None
    updates = [step for step in range(ramp.end + 1) if ramp.is_update(step)]
    lengths = [after - at for at, after in zip(updates, [*updates[1:], rates.steps], strict=True)]
    assert len(updates) == 12 and max(lengths) - min(lengths) <= 4  # 100,000 is no multiple of 12
    assert [ramp.sparsity_at(step) for step in (0, updates[-1])] == [0.7, 0.9]
    for at, length in zip(updates, lengths, strict=True):
        assert rates.at(at) == rates.peak == pytest.approx(100 * rates.at(at + length - 1))
    pattern = recipe.pruning.pattern
    assert (pattern.scope, pattern.monotone) == ("global", True)
    score = pattern.score
    assert isinstance(score, Fisher) and (score.block, score.every) == (50, 1)
    if name.startswith("upstream/"):
        settings = recipe.distillation
        assert (rates.peak, rates.lowest, score.sequences) == (5e-4, 5e-6, 1024 * 16)
        assert (settings.hard_weight, settings.soft_weight, settings.temperature) == (0, 1, 5.5)


@pytest.mark.parametrize("task", ["squad", "mnli"])
def test_gmp_begins_at_70_percent_and_prunes_seven_times_under_the_teacher_alone(task: str) -> None:
    path = RECIPES / f"downstream/{task}-gmp.toml"
    recipes = [FinetuneRecipe.read(path, words[5:]) for words in commands(path.read_text())]
    assert [recipe.training.epochs for recipe in recipes] == [30, 30, 10]
    for recipe, first in zip(recipes, (0.7, 0.7, 0.5), strict=True):
        assert (recipe.task, recipe.model.zeros) == (downstream(task).task, "free")
        assert recipe.distillation is not None and recipe.pruning is not None
        assert recipe.distillation.hard_weight == 0
        assert recipe.pruning.pattern.score == Magnitude()
        for epoch in (2_766, 5_533, 12_272):  # steps of an epoch
            steps = round(epoch * recipe.training.epochs)
            ramp, rates = recipe.pruning.ramp(steps), recipe.learning_rate(steps)
            updates = [step for step in range(ramp.end + 1) if ramp.is_update(step)]
            assert len(updates) == 7 and ramp.sparsity_at(updates[0]) == first
            assert updates[0] == pytest.approx(2 * epoch, rel=1e-3)
            assert min(after - at for at, after in pairwise(updates)) > 0.9 * epoch
            assert all(rates.at(at) > 9 * rates.at(at - 1) for at in updates)


@pytest.mark.parametrize(
    "recipe", [r for r in ALL if r.partition("/")[0] in ("upstream", "minilm")]
)
def test_each_command_that_an_upstream_recipe_shows_is_accepted(recipe: str) -> None:
    for _, verb, named, *rest in commands((RECIPES / recipe).read_text()):
        path = find_recipe(ROOT / named if named.endswith(".toml") else named)
        kind = kind_of(path.relative_to(RECIPES).as_posix())
        assert (verb == "finetune") == (kind is FinetuneRecipe) and rest[0] == "--output"
        kind.read(path, overrides=rest[2:])


@pytest.mark.parametrize("task", GLUE)
def test_glue_task_has_the_official_columns_classes_and_metrics(task: str) -> None:
    recipe = downstream(task).task
    assert (recipe.hub, recipe.hub_config) == ("nyu-mll/glue", task)
    assert ((recipe.text, recipe.text_pair), recipe.classes, recipe.metrics) == GLUE[task]
    assert recipe.train == "train"
    assert recipe.validation == ("validation_matched" if task == "mnli" else "validation")
    mismatched = {"mismatched": "validation_mismatched"} if task == "mnli" else {}
    assert recipe.more_validation == mismatched
    assert recipe.kind == ("regression" if task == "stsb" else "classification")
    assert recipe.sequence_tokens == 128


def test_squad_has_the_usual_windows() -> None:
    task = downstream("squad").task
    assert (task.kind, task.hub) == ("question-answering", "rajpurkar/squad")
    assert (task.text, task.text_pair, task.label) == ("question", "context", "answers")
    assert (task.sequence_tokens, task.stride_tokens) == (384, 128)
    assert task.metrics == ("exact_match", "squad_f1")


def test_a_hybrid_model_is_filled_under_the_same_teacher_from_what_was_shrunk() -> None:
    hybrid, filled = downstream("squad-hybrid"), downstream("squad-filled")
    assert hybrid.task == filled.task == downstream("squad").task
    assert hybrid.distillation == filled.distillation
    assert (hybrid.model.zeros, filled.model.zeros) == ("free", "free")
    shrink = f"opfa shrink runs/{hybrid.name} --output {filled.model.init}"
    assert shrink in (RECIPES / "downstream/squad-filled.toml").read_text()
    assert hybrid.pruning is not None and filled.pruning is None
    blocks, neurons = hybrid.pruning.parts
    assert (blocks.grain, neurons.grain) == (Block(rows=32, columns=32), Neurons())


@pytest.mark.parametrize("task", ["squad", "mnli", "qqp"])
def test_movement_has_the_authors_schedule_and_keeps_15_10_or_3_percent(task: str) -> None:
    recipe = downstream(f"{task}-movement")
    assert recipe.task == downstream(task).task and recipe.model.zeros == "free"
    assert recipe.pruning is not None and recipe.pruning.pattern.score == Movement()
    schedule, training = recipe.pruning.schedule, recipe.training
    cool_down = 1 if task == "mnli" else 2
    assert schedule.start == training.warmup
    assert schedule.end == pytest.approx(1 - cool_down * training.warmup)
    assert (schedule.hold_until, schedule.target, training.learning_rate) == (1.0, 0.85, 3e-5)
    assert {"squad": (10, 16), "mnli": (6, 32), "qqp": (10, 32)}[task] == (
        training.epochs,
        training.batch,
    )


@pytest.mark.parametrize("task", ["squad", "mnli", "qqp"])
def test_each_command_of_a_movement_recipe_is_accepted(task: str) -> None:
    path = RECIPES / f"downstream/{task}-movement.toml"
    hard, soft = (FinetuneRecipe.read(path, words[5:]) for words in commands(path.read_text()))
    assert hard == downstream(f"{task}-movement") and soft.pruning is not None
    assert isinstance(soft.pruning.pattern.score, SoftMovement)


@pytest.mark.parametrize("task", TASKS)
def test_sparse_model_is_fine_tuned_with_its_zeros_held(task: str) -> None:
    for name in (task, f"{task}-qat"):
        assert downstream(name).model.zeros == "held"
        assert downstream(name).pruning is None
    assert downstream(task).model.init == "runs/bert-base-90/model"
    assert downstream(task).quantization is None


@pytest.mark.parametrize("task", TASKS)
def test_qat_differs_from_its_twin_only_by_being_a_second_shorter_stage_in_8_bits(
    task: str,
) -> None:
    qat = downstream(f"{task}-qat")
    assert qat.quantization is not None
    assert (qat.quantization.bits, qat.quantization.start) == (8, 0.0)
    assert qat.model.init == f"runs/{task}/model"
    assert qat.training.learning_rate == 1e-5
    assert qat.training.epochs == (2 if task.startswith("squad") else 3)
    assert shared(qat) == shared(downstream(task))


def shared(recipe: FinetuneRecipe) -> dict[str, Any]:  # Any: whatever a recipe holds
    """What both stages have in common."""
    values = recipe.model_dump(exclude={"name", "quantization"})
    del values["model"]["init"], values["training"]["epochs"], values["training"]["learning_rate"]
    return values
