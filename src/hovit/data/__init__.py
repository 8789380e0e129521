"""Images: read (`readers`), decoded once and split (`pack`), fed to a model (`loader`)."""
