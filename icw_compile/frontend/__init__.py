"""From Dynamo's graph to the one that the passes work on."""
