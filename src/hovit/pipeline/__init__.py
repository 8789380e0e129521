"""The commands' work: train, measure, evaluate, analyse, sweep, estimate, evidence."""
