"""How a model gets small: schedules, pruning, distillation, 8 bits."""
