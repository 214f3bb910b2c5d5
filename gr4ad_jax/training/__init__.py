"""The compiled train step, the loop around it, checkpoints and logs."""
