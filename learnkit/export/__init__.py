"""Trained models as files for inference, and the predictor that loads them."""
