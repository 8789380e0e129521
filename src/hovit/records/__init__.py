"""Records of finished work, and test predictions."""
