"""The bottom layer: errors for users, devices, logs and the training clock."""
