"""What the ranks of `launching.py` import, before they are forked instead of in each."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # as in the ranks; DeepSpeed looks when it is imported
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its compiler has threads, which no fork keeps

import accelerate  # noqa: E402, F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401 - else stages 1 to 3 do
import ranks  # noqa: E402, F401
import trainer_ranks  # noqa: E402, F401

del os.environ["TORCHDYNAMO_DISABLE"]
gc.freeze()  # DeepSpeed collects garbage many times a run; among all these modules that takes 0.4 s
