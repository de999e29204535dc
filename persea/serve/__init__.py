"""persea serve: a model behind OpenAI's routes, with thinking efforts, tools and exact
log-probabilities.

schema        request bodies
limits        API key, body sizes, timeouts and concurrency
batching      continuous batching: answers that share each forward pass
scheduler     the order of work on the model, for all requests
streaming     the served model, and parsing of an answer while it is generated
logprobs      log-probabilities in the formats of vLLM and OpenAI
routes        the handlers of all routes
server        the application, its errors and its start
chat_session  `persea chat`: a conversation in the terminal
"""
