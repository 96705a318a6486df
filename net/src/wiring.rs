//! Joining the guest to its CNI interfaces, inside the pod's network namespace.
//!
//! For each interface a tap, and between the two a redirect of all frames in both directions, before the namespace's own stack sees
//! them (ingress qdisc, u32 that matches everything, mirred: kernels without cls_matchall have these). The stack is kept from speaking,
//! too: no IPv6 (router solicitations, MLD, duplicate address detection), no ARP replies.
//!
//! IPv4 addresses stay on the interfaces: CNI plugins read them on DEL and CHECK (bridge and ptp find the masquerading rules by
//! them). IPv6 addresses go with IPv6, so [`unsilence`] puts them back before DEL.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{Handle, LinkUnspec, packet_route::address::AddressHeaderFlags};

use crate::{
    GuestInterface,
    cni::result::AddResult,
    error::NetError,
    namespace,
    observed::Observed,
    plan::{Plan, PlanError, PlannedInterface, plan},
    tap,
};

/// ETH_P_ALL; the kernel takes it in network order, and a filter in host order silently matches nothing.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// The first that tc(8) gives to filters without one.
const PRIORITY: u16 = 49152;

/// The guest's side of the pod's network.
pub(crate) struct Wired {
    pub(crate) interfaces: Vec<GuestInterface>,
    pub(crate) plan: Plan,
}

/// Reads what the plugins have made in the namespace at `netns`, makes the taps and joins them.
pub(crate) async fn wire(netns: &Path, result: AddResult) -> Result<Wired, NetError> {
    in_namespace(netns, async move |handle| {
        let observed = Observed::read(&handle)
            .await
            .map_err(NetError::interface("read links, addresses and routes", "*"))?;
        let plan = plan(&result, &observed).map_err(|error: PlanError| {
            let name = error.interface().to_owned();
            NetError::interface("redirect frames", &name)(io::Error::other(error))
        })?;
        let mut interfaces = Vec::new();
        let mut number = 0;
        for interface in &plan.interfaces {
            while observed.links.contains_key(&format!("tap{number}")) {
                number += 1;
            }
            let tap = join(&handle, interface, &format!("tap{number}")).await?;
            number += 1;
            interfaces.push(GuestInterface {
                name: interface.name.clone(),
                mac: interface.link.mac,
                mtu: interface.link.mtu,
                addresses: interface.addresses.clone(),
                tap: vec![tap],
            });
        }
        Ok(Wired { interfaces, plan })
    })
    .await
}

/// Gives the interfaces in the namespace the addresses back that [`wire`] has taken, for plugins that look them up on DEL.
pub(crate) async fn unsilence(netns: &Path, result: AddResult) -> Result<(), NetError> {
    in_namespace(netns, async move |handle| {
        let mut is_first = true;
        for (index, interface) in result.in_sandbox() {
            let addresses: Vec<IpNet> = result
                .addresses_of(index, is_first)
                .map(|ip| ip.address)
                .filter(|address| address.addr().is_ipv6())
                .collect();
            is_first = false;
            if addresses.is_empty() {
                continue;
            }
            let name = &interface.name;
            let fail = |error| NetError::interface("restore addresses", name)(error);
            // Without a link there is nothing to look up: DEL has been here before.
            let Some(link) = find(&handle, name).await.map_err(fail)? else {
                continue;
            };
            set_sysctl("ipv6", name, "accept_ra", "0")?;
            set_sysctl("ipv6", name, "addr_gen_mode", "1")?;
            set_sysctl("ipv6", name, "disable_ipv6", "0")?;
            for address in addresses {
                let mut request = handle
                    .address()
                    .add(link, address.addr(), address.prefix_len())
                    .replace();
                request.message_mut().header.flags = AddressHeaderFlags::Nodad;
                request.execute().await.map_err(fail)?;
            }
        }
        Ok(())
    })
    .await
}

/// Runs netlink work on a thread inside the namespace, with a socket and a runtime of its own.
async fn in_namespace<T, F>(netns: &Path, work: F) -> Result<T, NetError>
where
    T: Send + 'static,
    F: AsyncFnOnce(Handle) -> Result<T, NetError> + Send + 'static,
{
    let done = namespace::run_in(netns, move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            // Ends with the runtime.
            drop(tokio::spawn(connection));
            Ok(work(handle).await)
        })
    });
    done.await
        .map_err(NetError::file("work in the network namespace", netns))?
}

async fn join(handle: &Handle, interface: &PlannedInterface, tap_name: &str) -> Result<OwnedFd, NetError> {
    let name = &interface.name;
    silence(name)?;
    let tap = tap::open(tap_name).map_err(NetError::interface("open a tap", tap_name))?;
    silence(tap_name)?;
    let tap_index = find(handle, tap_name)
        .await
        .and_then(|index| index.ok_or(rtnetlink::Error::RequestFailed))
        .map_err(NetError::interface("find the tap", tap_name))?;
    let up = LinkUnspec::new_with_index(tap_index)
        .mtu(interface.link.mtu)
        .up()
        .build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(NetError::interface("set MTU and up", tap_name))?;
    redirect(handle, tap_index, interface.link.index)
        .await
        .map_err(NetError::interface("redirect frames", tap_name))?;
    redirect(handle, interface.link.index, tap_index)
        .await
        .map_err(NetError::interface("redirect frames", name))?;
    let up = LinkUnspec::new_with_index(interface.link.index).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(NetError::interface("set up", name))?;
    Ok(tap)
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let from = i32::try_from(from).map_err(|_| rtnetlink::Error::RequestFailed)?;
    match handle.qdisc().add(from).ingress().execute().await {
        // A plugin may have made one (or a clsact, which serves as well).
        Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().raw_os_error() == Some(libc::EEXIST) => {}
        other => other?,
    }
    // The order of these calls matters: `priority` would overwrite `protocol`.
    handle
        .traffic_filter(from)
        .add()
        .ingress()
        .priority(PRIORITY)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)?
        .execute()
        .await
}

async fn find(handle: &Handle, name: &str) -> Result<Option<u32>, rtnetlink::Error> {
    match handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
    {
        Ok(found) => Ok(found.map(|link| link.header.index)),
        Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().raw_os_error() == Some(libc::ENODEV) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Keeps the namespace's own stack from speaking on an interface.
fn silence(interface: &str) -> Result<(), NetError> {
    set_sysctl("ipv6", interface, "disable_ipv6", "1")?;
    set_sysctl("ipv4", interface, "arp_ignore", "8")
}

/// /proc/sys/net is that of the calling thread's namespace. Fine when the kernel has no such parameter (no IPv6, an MTU below 1280).
fn set_sysctl(family: &str, interface: &str, name: &'static str, value: &str) -> Result<(), NetError> {
    let path = format!("/proc/sys/net/{family}/conf/{interface}/{name}");
    match fs::write(&path, value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(NetError::file(
            "silence the network namespace's own stack by",
            path,
        )(error)),
        _ => Ok(()),
    }
}
