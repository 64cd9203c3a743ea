"""The shipped small model: `base`, and the teachers. Data of the package, found by `danceopd.recipe.recipe.shipped`."""
