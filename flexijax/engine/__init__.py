"""Running requests: prefill, decode, sampling, batching."""
