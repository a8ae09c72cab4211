"""Pure functions on tensors: they know no plan, no session and no wire."""
