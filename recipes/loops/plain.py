"""Plain torch: python recipes/loops/plain.py MODEL TRAIN.jsonl OUTPUT

Records have text and label.
"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import opfa

name, file, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=file, split="train").class_encode_column("label")
classes = data.features["label"].num_classes
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
data = data.remove_columns("text").rename_column("label", "labels")

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
print(opfa.lock(model)["total"])  # before the optimizer is made

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
model.train()
for batch in DataLoader(data, 32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)):
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

opfa.fuse(model)
model.save_pretrained(output)
tokenizer.save_pretrained(output)
