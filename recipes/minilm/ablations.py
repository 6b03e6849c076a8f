"""What is changed of `minilm-ablation.toml`, one run each: by its name the question that it answers
and the changes.
"""

HIDDEN = ("distillation.tokens=masked", "distillation.hidden_weight=10")
ABLATIONS = {
    "baseline": ("as in the paper, but for the learning rate", ()),
    "baseline-again": ("how much is luck? Another seed", ("seed=43",)),
    "no-distillation": ("is the teacher worth its time?", ("distillation=",)),
    "no-rewinding": (
        "does going back to a high rate after pruning help?",
        ("training.rewind_learning_rate=false",),
    ),
    "kd-masked-tokens": (
        "are soft targets of masked tokens alone as good?",
        ("distillation.tokens=masked",),
    ),
    "kd-masked-and-hidden": ("do hidden states teach more than they cost?", HIDDEN),
    "hidden-10-rate-1e-3": ("the same, twice the rate", (*HIDDEN, "training.learning_rate=1e-3")),
    "hidden-10-rate-2e-3": ("four times the rate", (*HIDDEN, "training.learning_rate=2e-3")),
    "hidden-100-rate-1e-3": (
        "ten times the weight of hidden states",
        (HIDDEN[0], "distillation.hidden_weight=100", "training.learning_rate=1e-3"),
    ),
    "monotone": ("must pruned weights be allowed to return?", ("pruning.pattern.monotone=true",)),
    "global": ("is one threshold for all layers better?", ("pruning.pattern.scope=global",)),
    "update-every-5": ("twice as many pruning steps?", ("pruning.schedule.every=5",)),
    "update-every-50": ("a fifth of the pruning steps?", ("pruning.schedule.every=50",)),
}
