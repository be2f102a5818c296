"""What is measured, each a module to run: `python -m tests.benchmarks.<name>`. README.md lists them."""
