"""Accelerate: accelerate launch recipes/loops/accelerate_loop.py MODEL TRAIN.jsonl OUTPUT

Records have text and label. One process or several (data parallel).
"""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import opfa

name, file, output = sys.argv[1:]
accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=file, split="train").class_encode_column("label")
classes = data.features["label"].num_classes
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
data = data.remove_columns("text").rename_column("label", "labels")

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
opfa.lock(model)  # before `prepare`

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
batches = DataLoader(data, 16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
model.train()
for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

model = accelerator.unwrap_model(model)
opfa.fuse(model)
if accelerator.is_main_process:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
accelerator.end_training()
