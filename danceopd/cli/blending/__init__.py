"""For `danceopd blend` by methods that look at inputs: what is asked for, and how the base and its data are opened."""
