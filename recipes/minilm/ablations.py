"""What is changed of `minilm-ablation.toml`: by a run's name the question that it answers and the
changes.
"""

ORIGINAL = (
    *("model.init=model", "distillation.teacher=model"),
    *("distillation.hard_weight=0", "distillation.soft_weight=0"),
)
SMALL_BATCHES = (
    *("training.batch=4", "training.steps=600", "training.warmup_steps=40"),
    *("training.learning_rate=7.5e-4", "pruning.schedule.end=300"),
    *("pruning.schedule.hold_until=480", "pruning.schedule.every=20"),
)
ABLATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("soft targets and hidden states of a teacher that learnt masked tokens", ()),
    "another-seed": ("how much is luck?", ("seed=43",)),
    "no-distillation": ("is the teacher worth its time?", ("distillation=",)),
    "no-hidden-states": (
        "do hidden states teach more than soft targets?",
        ("distillation.hidden_weight=0",),
    ),
    "only-hidden-states": (
        "are hidden states enough?",
        ("distillation.hard_weight=0", "distillation.soft_weight=0"),
    ),
    "original-hidden-states": (
        "and those of the original model, which knows no masked tokens?",
        ORIGINAL,
    ),
    "original-small-batches": (
        "and in steps of a quarter of the tokens, at half the learning rate?",
        (*ORIGINAL, *SMALL_BATCHES),
    ),
    "original-small-batches-mlm": (
        "and learning masked tokens too, with the teacher's head?",
        ("distillation.teacher=model", "distillation.soft_weight=0", *SMALL_BATCHES),
    ),
    "small-batches": ("or such steps alone, under the teacher?", SMALL_BATCHES),
    "all-tokens": ("are soft targets of all tokens better?", ("distillation.tokens=all",)),
    "paper-distillation": (
        "as in the paper: soft targets of all tokens, no hidden states",
        ("distillation.tokens=all", "distillation.hidden_weight=0"),
    ),
    "no-rewinding": (
        "does going back to a high rate after a mask update help?",
        ("training.rewind_learning_rate=false",),
    ),
    "monotone": ("must pruned weights be allowed to return?", ("pruning.pattern.monotone=true",)),
    "global": ("is one threshold for all layers better?", ("pruning.pattern.scope=global",)),
    "update-every-1": ("five times as many mask updates?", ("pruning.schedule.every=1",)),
    "update-every-25": ("a fifth as many?", ("pruning.schedule.every=25",)),
}
