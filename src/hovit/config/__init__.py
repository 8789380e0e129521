"""Configuration: schema, loading, validation, and the plan of runs at one scale."""
