"""transformers' Trainer: python recipes/loops/trainer.py MODEL TRAIN.jsonl OUTPUT

Records have text and label. Needs accelerate. A checkpoint in the middle is sparse and plain, and
resuming from it works as always.
"""

import logging
import sys

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

name, file, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=file, split="train").class_encode_column("label")
classes = data.features["label"].num_classes
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
model.accepts_loss_kwargs = False  # else its loss is too large by the accumulation steps
print(opfa.lock(model)["total"])  # before the Trainer is made

trainer = Trainer(
    model,
    TrainingArguments(
        f"{output}/checkpoints",
        learning_rate=5e-5,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorWithPadding(tokenizer),
    callbacks=[SparsityGuard()],
)
trainer.train()

opfa.fuse(model)
model.save_pretrained(output)
tokenizer.save_pretrained(output)
