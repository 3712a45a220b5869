"""Benchmarks, run by ./scripts/bench NAME; `harness` is what they share."""
