"""Differentially private training and what is around it."""
