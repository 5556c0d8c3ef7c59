"""A server that speaks OpenAI's API, on one engine; needs the `serve` extra."""
