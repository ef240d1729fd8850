"""From a checkpoint to a finished store: recipe, plan, jobs, run."""
