"""Trained baselines that rank every ad without semantic IDs: SASRec and two towers."""
