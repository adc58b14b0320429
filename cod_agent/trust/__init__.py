"""How far a context is to be trusted: each part answers one question about what an update wrote.

`blame`: which task and whose words is each line from? `suspicions`: what in it looks like an order or a secret (`plain`: text as a reader
takes it)? `write_gate`: may it be in force at once, or is it held back? `canary`: how do tasks go with what is held back? `review`: what
do people decide, and how is that taken back?
"""
