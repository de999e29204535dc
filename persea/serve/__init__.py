"""persea serve: a model behind OpenAI's routes on this machine, with the thinking switch, tools and real log-probabilities.

schema what a request may say; guard who may ask, and how much; speak the model, token by token; scores log-probabilities as servers spell
them; app the routes.
"""
