"""PEFT's LoRA: python recipes/loops/lora.py MODEL TRAIN.jsonl OUTPUT

Records have text and label. Needs peft. Updates are masked while training and when they are merged,
so the merged model gives the same answers and has the same zeros.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import opfa
from opfa.integrations.lora import masked_lora

name, file, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=file, split="train").class_encode_column("label")
classes = data.features["label"].num_classes
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
data = data.remove_columns("text").rename_column("label", "labels")

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
locked = list(opfa.lock(model)["tensors"])  # the weights that have zeros: "….query.weight", …
targets = [weight.removesuffix(".weight") for weight in locked]
config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets)
model = get_peft_model(model, masked_lora(config))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for batch in DataLoader(data, 32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

merged = model.merge_and_unload()
opfa.fuse(merged)
merged.save_pretrained(output)
tokenizer.save_pretrained(output)
