"""Accuracy of given weights on ImageNet, for tables whose models are not trained here."""
