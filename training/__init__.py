"""From a dense checkpoint to masks and trained adapters: prune and fine-tune in turns (LoSA).

`losa_export.training.train.train` is the way in; `losa_export.training.config.TrainConfig` says what to do.
The modules below import torch; `config`, `schedule`, `allocation` and `journal` do not.
"""
