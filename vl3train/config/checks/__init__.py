"""What keeps a run from starting, by subject: numbers, weights, budgets, machine, tracking, launch."""
