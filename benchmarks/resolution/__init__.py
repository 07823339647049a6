"""The paper's question: what does a higher resolution cost, in encoder time and in tokens?"""
