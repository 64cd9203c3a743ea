"""Training of the shipped small model, stage by stage, each resumable and a function of its seed.

``autoencoder`` and ``base`` make the pipeline; ``generation``, ``editing``, ``local-edit`` and ``global-edit``
are LoRA teachers on it, each trained on its own task alone: that is where the conflict comes from which a merge
has to resolve. Everything runs on the exact world's training split (``danceopd/scenes``).
"""

from danceopd.teach.stages import STAGES, teach

__all__ = ["STAGES", "teach"]
