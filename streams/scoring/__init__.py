"""The scorer: ranks the candidates of a request by the model published last, without an LM in the path."""
