"""transformers' Trainer with DeepSpeed's ZeRO 2 or 3:

    torchrun --nproc-per-node 2 recipes/loops/trainer_deepspeed.py MODEL TRAIN.jsonl OUTPUT STAGE

or `deepspeed --no_local_rank` in place of torchrun. Records have text and label. Needs accelerate.
A checkpoint in the middle has a plain and sparse model beside DeepSpeed's own files, and resuming
from it works as always.
"""

import logging
import sys

import deepspeed
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import opfa
from opfa.integrations.guard import SparsityGuard

logging.basicConfig(format="%(message)s")
logging.getLogger("opfa").setLevel(logging.INFO)  # the guard says at the end what it held

name, file, output, stage = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=file, split="train").class_encode_column("label")
classes = data.features["label"].num_classes
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)

# Before TrainingArguments are made: after that, ZeRO 3 partitions a model while it is loaded.
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
model.accepts_loss_kwargs = False  # else its loss is too large by accumulation steps x processes
opfa.lock(model)

trainer = Trainer(
    model,
    TrainingArguments(
        f"{output}/checkpoints",
        learning_rate=5e-5,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": int(stage),
                "stage3_param_persistence_threshold": "auto",
                "stage3_gather_16bit_weights_on_model_save": True,  # else it saves its own shards
            },
        },
    ),
    train_dataset=data,
    data_collator=DataCollatorWithPadding(tokenizer),
    callbacks=[SparsityGuard()],
)
trainer.train()

# ZeRO 3 leaves a part of every weight on each process; fusing needs whole ones.
with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
    opfa.fuse(model)
trainer.save_model(output)
