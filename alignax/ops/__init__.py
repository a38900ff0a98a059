"""Leaf mathematics: the chunked head, links, reductions and KL estimators. Arrays in, arrays out."""
