//! Who a node is: the cluster's certificate authority, node certificates, and TLS both ways.

#![forbid(unsafe_code)]
