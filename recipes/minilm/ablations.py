"""What is changed of `minilm-ablation.toml`, one thing a run: by its name the question that it
answers and the change.
"""

ABLATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("the students' recipe, a tenth of their steps", ()),
    "another-seed": ("how much is luck?", ("seed=43",)),
    "no-distillation": ("is the teacher worth its time?", ("distillation=",)),
    "no-distillation-longer": (
        "and for as many operations?",
        (
            "distillation=",
            *("training.steps=400", "pruning.schedule.end=200"),
            "pruning.schedule.hold_until=320",
        ),
    ),
    "no-hidden-states": (
        "do hidden states teach more than soft targets?",
        ("distillation.hidden_weight=0",),
    ),
    "all-tokens": ("are soft targets of all tokens better?", ("distillation.tokens=all",)),
    "paper-distillation": (
        "as in the paper: soft targets of all tokens, no hidden states",
        ("distillation.tokens=all", "distillation.hidden_weight=0"),
    ),
    "rate-5e-4": ("a third of the learning rate?", ("training.learning_rate=5e-4",)),
    "no-rewinding": (
        "does going back to a high rate after a mask update help?",
        ("training.rewind_learning_rate=false",),
    ),
    "monotone": ("must pruned weights be allowed to return?", ("pruning.pattern.monotone=true",)),
    "global": ("is one threshold for all layers better?", ("pruning.pattern.scope=global",)),
    "update-every-5": ("twice as many mask updates?", ("pruning.schedule.every=5",)),
    "update-every-50": ("a fifth as many?", ("pruning.schedule.every=50",)),
}
