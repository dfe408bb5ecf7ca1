# Two nodes as two network namespaces with private addresses, and a torchrun in each: two_nodes.sh FOLDER COMMAND...
set -euo pipefail
folder=$1
shift
unshare -n sleep 900 &
other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add left type veth peer name right netns $other
ip addr add 10.77.0.1/24 dev left
ip link set left up
ip link set lo up
nsenter -t $other -n ip addr add 10.77.0.2/24 dev right
nsenter -t $other -n ip link set right up
nsenter -t $other -n ip link set lo up
common="--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29500 --rdzv-id two"
# Its own name has no address here, so the first node is told that it has the rendezvous.
export OMP_NUM_THREADS=1
GLOO_SOCKET_IFNAME=right nsenter -t $other -n "$PYTHON" -m torch.distributed.run $common --rdzv-conf is_host=0,read_timeout=300 --local-addr 10.77.0.2 "$@" \
    > "$folder/second.log" 2>&1 &
second=$!
status=0
GLOO_SOCKET_IFNAME=left "$PYTHON" -m torch.distributed.run $common --rdzv-conf is_host=1,read_timeout=300 --local-addr 10.77.0.1 "$@" \
    > "$folder/first.log" 2>&1 || status=$?
wait $second || status=$?
ip -j -s link show left > "$folder/link.json"
exit $status
