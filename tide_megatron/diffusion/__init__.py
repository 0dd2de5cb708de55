"""Hiding tokens: schedules, noise, who may attend to whom, and what each model reads."""
