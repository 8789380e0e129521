"""hovit: fast vision transformers, reproduced. `import hovit.models` registers the models."""
