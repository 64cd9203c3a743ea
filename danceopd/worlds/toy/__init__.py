"""Training of the small model that ships with the package, stage by stage; `danceopd teach STAGE` runs one.

The stages `autoencoder` and `base` make the pipeline; `generation`, `editing`, `local-edit` and `global-edit` train
LoRA teachers on it, each on its own task alone, so that merging them has something to resolve. All use the training
split of `danceopd.worlds.scenes`; every stage is a function of its seed and continues after an interruption. Start with
`stages.py`.
"""
