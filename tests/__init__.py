"""Tests: unit/ mirrors the package, golden/ replays recorded numbers, parallel/ runs on gloo ranks."""
