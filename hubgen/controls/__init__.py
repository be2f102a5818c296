"""What steers from outside: an object handed to a call, which sees a `Target` and never the pipeline."""
