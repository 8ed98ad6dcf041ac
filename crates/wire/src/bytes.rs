//! Messages as bytes, for what is stored and for what is carried within another message.

use prost::Message;

/// The message, encoded.
pub fn message_to_bytes(message: &impl Message) -> Vec<u8> {
    message.encode_to_vec()
}

/// The message of these bytes; `None` when they are not one. Unknown fields are passed over and
/// nothing is checked: the caller does that.
pub fn message_from_bytes<T: Message + Default>(bytes: &[u8]) -> Option<T> {
    T::decode(bytes).ok()
}
